//! `eval`: perplexity of a model, and beside another one.

use espalier_common::config;
use espalier_common::job::EvaluationSpec;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::args::EvalArgs;
use super::{CliError, local, screen};
use crate::error::RunError;
use crate::evaluate::{Measured, Standalone};
use crate::fleet::Roster;
use crate::metrics::CoordinatorMetrics;
use crate::report;
use crate::run::Setting;

/// Measures perplexity on workers of this machine.
pub(crate) async fn run(args: EvalArgs, json: bool) -> Result<(), CliError> {
    if args.seq_len < 2 {
        return Err(CliError::usage("--seq-len must be at least 2"));
    }
    let spec =
        EvaluationSpec { source: args.text.clone(), sequence_length: args.seq_len, max_windows: args.max_windows };
    let stop = local::stop_on_signal();
    let mut model = Passes::of(&args.model);
    let mut against = args.against.as_deref().map(Passes::of);
    model.measure(&args, &spec, &stop, json).await?;
    if let Some(against) = &mut against {
        against.measure(&args, &spec, &stop, json).await?;
        if args.bench {
            // There and back, so that a machine that becomes slower or faster on the way favours neither.
            against.measure(&args, &spec, &stop, json).await?;
            model.measure(&args, &spec, &stop, json).await?;
        }
        model.check_windows(against)?;
    }
    if json {
        let mut document = model.document(&args);
        document["text"] = json!(args.text);
        if let Some(against) = &against {
            document["against"] = against.document(&args);
            if args.bench {
                document["bench"]["speed_up"] = json!(against.seconds() / model.seconds());
            }
        }
        screen::out(&document.to_string());
    } else {
        model.lines(&args).iter().for_each(|line| screen::out(line));
        if let Some(against) = &against {
            screen::out(&format!("against {}:", against.model));
            against.lines(&args).iter().for_each(|line| screen::out(line));
            if args.bench {
                screen::out(&format!("{:.2} times as fast", against.seconds() / model.seconds()));
            }
        }
    }
    Ok(())
}

/// A model and what each pass over the windows measured.
struct Passes<'a> {
    model: &'a str,
    passes: Vec<Measured>,
}

impl<'a> Passes<'a> {
    fn of(model: &'a str) -> Self {
        Self { model, passes: Vec::new() }
    }

    /// One pass, on workers of its own: their peak memory is the model's.
    async fn measure(
        &mut self,
        args: &EvalArgs,
        spec: &EvaluationSpec,
        stop: &CancellationToken,
        silent: bool,
    ) -> Result<(), CliError> {
        let folder = tempfile::tempdir().map_err(|source| CliError::rejected(&source))?;
        let run_url = folder.path().to_string_lossy().into_owned();
        let roster = Roster::default();
        let (tracer, sending) = local::tracer()?;
        let setting = Setting { tracer, ..local::setting(&run_url, &args.local, roster.clone(), stop.clone())? };
        let events = setting.events.clone();
        let measured = local::shown(&events, silent, async {
            let store = config::open_store(&run_url).map_err(RunError::from)?;
            let evaluation = Standalone::open(self.model, spec, store)?;
            local::with_workers(
                &args.local,
                &folder.path().join("logs"),
                roster,
                CoordinatorMetrics::default(),
                evaluation.execute(&setting),
            )
            .await
        })
        .await;
        sending.finish().await;
        self.passes.push(measured?);
        Ok(())
    }

    /// Perplexities of different tokens cannot be compared.
    fn check_windows(&self, other: &Self) -> Result<(), CliError> {
        match (self.passes.first(), other.passes.first()) {
            (Some(here), Some(there)) if here.tokens != there.tokens => {
                let message = format!(
                    "{} and {} do not make the same tokens of the text, so their perplexities cannot be compared",
                    self.model, other.model
                );
                Err(CliError { message, code: crate::error::exit::REJECTED })
            }
            _ => Ok(()),
        }
    }

    /// Losses do not depend on the pass.
    fn window_nll(&self) -> &[f64] {
        self.passes.first().map_or(&[], |measured| &measured.window_nll)
    }

    /// Mean seconds of a pass.
    fn seconds(&self) -> f64 {
        let seconds: f64 = self.passes.iter().map(|measured| measured.seconds).sum();
        (seconds / self.passes.len().max(1) as f64).max(f64::MIN_POSITIVE)
    }

    fn tokens_per_second(&self, args: &EvalArgs) -> f64 {
        (self.window_nll().len() * args.seq_len) as f64 / self.seconds()
    }

    fn peak_rss_bytes(&self) -> u64 {
        self.passes.iter().map(|measured| measured.peak_rss_bytes).max().unwrap_or(0)
    }

    fn document(&self, args: &EvalArgs) -> Value {
        let nll = self.window_nll();
        let mut document = json!({
            "model": self.model,
            "perplexity": report::perplexity(nll, args.seq_len),
            "sequence_length": args.seq_len,
            "windows": nll.len(),
            "window_nll": nll,
        });
        if args.bench {
            let passes: Vec<f64> = self.passes.iter().map(|measured| measured.seconds).collect();
            document["bench"] = json!({
                "tokens_per_second": self.tokens_per_second(args),
                "seconds": self.seconds(),
                "seconds_by_pass": passes,
                "peak_rss_bytes": self.peak_rss_bytes(),
            });
        }
        document
    }

    fn lines(&self, args: &EvalArgs) -> Vec<String> {
        let nll = self.window_nll();
        let perplexity = report::perplexity(nll, args.seq_len);
        let mut lines = vec![format!("perplexity {perplexity:.4}  ({} windows of {} tokens)", nll.len(), args.seq_len)];
        if args.bench {
            let mebibytes = self.peak_rss_bytes() as f64 / f64::from(1 << 20);
            let speed = self.tokens_per_second(args);
            lines.push(format!("{speed:.1} tokens/s, {mebibytes:.0} MiB at most in a worker"));
        }
        lines
    }
}
