//! `eval`: perplexity of one model.

use espalier_common::job::EvaluationSpec;
use espalier_common::store;

use super::args::EvalArgs;
use super::{CliError, local, screen};
use crate::error::RunError;
use crate::evaluate;
use crate::fleet::Roster;
use crate::report;

/// Measures perplexity on workers of this machine.
pub(crate) async fn run(args: EvalArgs, json: bool) -> Result<(), CliError> {
    if args.seq_len < 2 {
        return Err(CliError::usage("--seq-len must be at least 2"));
    }
    let spec =
        EvaluationSpec { source: args.text.clone(), sequence_length: args.seq_len, max_windows: args.max_windows };
    let folder = tempfile::tempdir().map_err(|source| CliError::rejected(&source))?;
    let stop = local::stop_on_signal();
    let roster = Roster::default();
    let setting = local::setting(folder.path(), &args.local, roster.clone(), stop)?;
    let events = setting.events.clone();
    let nll = local::shown(&events, json, async {
        let store = store::open(&folder.path().to_string_lossy()).map_err(RunError::from)?;
        let evaluation = evaluate::Standalone::open(&args.model, &spec, store)?;
        local::with_workers(&args.local, &folder.path().join("logs"), roster, evaluation.execute(&setting)).await
    })
    .await?;
    let perplexity = report::perplexity(&nll, args.seq_len);
    if json {
        let document = serde_json::json!({
            "model": args.model,
            "text": args.text,
            "perplexity": perplexity,
            "sequence_length": args.seq_len,
            "windows": nll.len(),
            "window_nll": nll,
        });
        screen::out(&document.to_string());
    } else {
        screen::out(&format!("perplexity {perplexity:.4}  ({} windows of {} tokens)", nll.len(), args.seq_len));
    }
    Ok(())
}
