//! `eval`: perplexity of one model.

use espalier_common::config;
use espalier_common::job::EvaluationSpec;

use super::args::EvalArgs;
use super::{CliError, local, screen};
use crate::error::RunError;
use crate::evaluate::{self, Measured};
use crate::fleet::Roster;
use crate::metrics::CoordinatorMetrics;
use crate::report;

/// Measures perplexity on workers of this machine.
pub(crate) async fn run(args: EvalArgs, json: bool) -> Result<(), CliError> {
    if args.seq_len < 2 {
        return Err(CliError::usage("--seq-len must be at least 2"));
    }
    let spec =
        EvaluationSpec { source: args.text.clone(), sequence_length: args.seq_len, max_windows: args.max_windows };
    let folder = tempfile::tempdir().map_err(|source| CliError::rejected(&source))?;
    let run_url = folder.path().to_string_lossy().into_owned();
    let stop = local::stop_on_signal();
    let roster = Roster::default();
    let setting = local::setting(&run_url, &args.local, roster.clone(), stop)?;
    let events = setting.events.clone();
    let measured = local::shown(&events, json, async {
        let store = config::open_store(&run_url).map_err(RunError::from)?;
        let evaluation = evaluate::Standalone::open(&args.model, &spec, store)?;
        local::with_workers(
            &args.local,
            &folder.path().join("logs"),
            roster,
            CoordinatorMetrics::default(),
            evaluation.execute(&setting),
        )
        .await
    })
    .await?;
    let Measured { window_nll: nll, seconds, peak_rss_bytes } = measured;
    let tokens_per_second = (nll.len() * args.seq_len) as f64 / seconds.max(f64::MIN_POSITIVE);
    let perplexity = report::perplexity(&nll, args.seq_len);
    if json {
        let mut document = serde_json::json!({
            "model": args.model,
            "text": args.text,
            "perplexity": perplexity,
            "sequence_length": args.seq_len,
            "windows": nll.len(),
            "window_nll": nll,
        });
        if args.bench {
            document["bench"] = serde_json::json!({
                "tokens_per_second": tokens_per_second,
                "seconds": seconds,
                "peak_rss_bytes": peak_rss_bytes,
            });
        }
        screen::out(&document.to_string());
    } else {
        screen::out(&format!("perplexity {perplexity:.4}  ({} windows of {} tokens)", nll.len(), args.seq_len));
        if args.bench {
            let mebibytes = peak_rss_bytes as f64 / f64::from(1 << 20);
            screen::out(&format!("{tokens_per_second:.1} tokens/s, {mebibytes:.0} MiB at most in a worker"));
        }
    }
    Ok(())
}
