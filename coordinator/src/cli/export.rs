//! `export`.

use serde_json::json;

use super::args::ExportArgs;
use super::{CliError, screen};
use crate::layout::export::{Export, ExportError, export};

/// Writes a masked result in another layout.
pub(crate) fn run(args: &ExportArgs, json: bool) -> Result<(), CliError> {
    let source = espalier_common::config::locate(&args.model).map_err(|error| CliError::rejected(&error))?;
    let shard_bytes = espalier_common::job::parse_size(&args.shard_size).ok_or_else(|| {
        CliError::usage(format!("--shard-size {}: not a size such as 5GB or 512MiB", args.shard_size))
    })?;
    let asked = Export {
        source: &source,
        target: &args.output,
        layout: args.layout.into(),
        shard_bytes,
        tensor_parallel: args.tensor_parallel.unwrap_or(1),
    };
    let files = export(&asked).map_err(|error: ExportError| CliError::rejected(&error))?;
    let output = args.output.display();
    if json {
        screen::out(&json!({ "output": output.to_string(), "files": files }).to_string());
    } else {
        screen::out(&format!("{} files in {output}", files.len()));
    }
    Ok(())
}
