//! `inspect`.

use espalier_common::config;

use super::args::InspectArgs;
use super::{CliError, screen, table};
use crate::inspect::{self, Inspection, Totals};

/// Prints what a checkpoint's weights look like.
pub(crate) fn run(args: &InspectArgs, json: bool) -> Result<(), CliError> {
    let open = |source: &str| config::open_model(source).map_err(|error| CliError::rejected(&error));
    let model = open(&args.model)?;
    let against = args.against.as_deref().map(open).transpose()?;
    let inspection =
        inspect::inspect(model.as_ref(), against.as_deref(), None).map_err(|error| CliError::rejected(&error))?;
    if json {
        screen::out(&serde_json::to_string_pretty(&inspection).expect("an inspection is plain data"));
    } else {
        screen::out(&tables(&inspection));
    }
    Ok(())
}

fn tables(inspection: &Inspection) -> String {
    let mut kinds = table::table(&["kind", "weights", "zeros", "sparsity", "N:M", "change"]);
    let row = |name: &str, totals: &Totals, patterns: String| {
        [
            name.to_owned(),
            totals.elements.to_string(),
            totals.zeros.to_string(),
            format!("{:.3} %", 100.0 * totals.sparsity),
            patterns,
            totals.relative_change.map_or_else(String::new, |change| format!("{change:.4}")),
        ]
    };
    for (kind, totals) in &inspection.kinds {
        kinds.add_row(row(kind, totals, obeyed(inspection, kind)));
    }
    kinds.add_row(row("all matrices", &inspection.totals, String::new()));
    let mut text = kinds.to_string();
    if inspection.totals.non_finite > 0 {
        text.push_str(&format!("\n{} weights are NaN or infinite", inspection.totals.non_finite));
    }
    if let Some(differences) = &inspection.differences {
        text.push_str(&format!("\n{} tensors changed", differences.changed.len()));
        for (what, names) in
            [("reshaped", &differences.reshaped), ("added", &differences.added), ("missing", &differences.missing)]
        {
            if !names.is_empty() {
                text.push_str(&format!("\n{what}: {}", names.join(", ")));
            }
        }
    }
    text
}

/// The patterns that every group of every matrix of a kind obeys.
fn obeyed(inspection: &Inspection, kind: &str) -> String {
    let mut obeyed: Option<Vec<&str>> = None;
    for tensor in inspection.tensors.iter().filter(|tensor| crate::view::kind(&tensor.name) == kind) {
        let here: Vec<&str> = tensor
            .conformity
            .iter()
            .filter(|conformity| conformity.groups > 0 && conformity.conforming == conformity.groups)
            .map(|conformity| conformity.pattern.as_str())
            .collect();
        obeyed = Some(match obeyed {
            None => here,
            Some(before) => before.into_iter().filter(|pattern| here.contains(pattern)).collect(),
        });
    }
    obeyed.unwrap_or_default().join(" ")
}
