//! `inspect`.

use super::CliError;
use super::args::InspectArgs;

/// Placeholder until merged.
pub(crate) fn run(_: &InspectArgs, _: bool) -> Result<(), CliError> {
    Ok(())
}
