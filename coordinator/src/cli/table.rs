//! The final table.

use std::collections::BTreeMap;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use espalier_common::report::LinkUse;

use crate::plan::strategy::Choice;
use crate::report::{LinkTotal, Report, SublayerEntry};
use crate::view::kind;

/// A table in the house's look, right-aligned from the second column on.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(header);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What a person wants to know of a finished run.
pub(crate) fn summary(report: &Report, run_folder: &str) -> String {
    let mut text = String::new();
    let mut kinds: BTreeMap<&str, Vec<&SublayerEntry>> = BTreeMap::new();
    let mut order = Vec::new();
    for sublayer in &report.sublayers {
        let kind = kind(&sublayer.name);
        if !kinds.contains_key(kind) {
            order.push(kind);
        }
        kinds.entry(kind).or_default().push(sublayer);
    }
    let mut header = vec!["sublayer", "mean error", "worst error", "sparsity", "solve s"];
    let is_held_out = report.sublayers.iter().any(|entry| entry.held_out_error.is_some());
    if is_held_out {
        header.insert(3, "held-out error");
    }
    let mut errors = table(&header);
    for kind in order {
        let entries = &kinds[kind];
        let count = entries.len() as f64;
        let mean = entries.iter().map(|entry| entry.rel_error).sum::<f64>() / count;
        let worst = entries.iter().map(|entry| entry.rel_error).fold(0.0, f64::max);
        let zeros: u64 = entries.iter().map(|entry| entry.zeros).sum();
        let elements: u64 = entries.iter().map(|entry| entry.elements).sum();
        let seconds: f64 = entries.iter().map(|entry| entry.seconds).sum();
        let mut row = vec![
            kind.to_owned(),
            format!("{mean:.5}"),
            format!("{worst:.5}"),
            format!("{:.2} %", 100.0 * zeros as f64 / elements.max(1) as f64),
            format!("{seconds:.2}"),
        ];
        if is_held_out {
            let measured = || entries.iter().filter_map(|entry| entry.held_out_error);
            row.insert(3, format!("{:.5}", measured().sum::<f64>() / measured().count().max(1) as f64));
        }
        errors.add_row(row);
    }
    text.push_str(&format!("{errors}\n"));
    let phases: Vec<String> = report
        .totals
        .seconds_by_phase
        .iter()
        .filter(|(_, seconds)| **seconds >= 0.05)
        .map(|(phase, seconds)| format!("{phase} {seconds:.1}"))
        .collect();
    let method = format!("{} to {}", report.method.name, report.pattern);
    let spent = if phases.is_empty() { String::new() } else { format!("  (worker seconds: {})", phases.join(", ")) };
    text.push_str(&format!("{method} in {:.1} s{spent}\n", report.totals.seconds));
    if let Some(told) = report.strategy.as_ref().and_then(Choice::told) {
        text.push_str(&format!("{told}\n"));
    }
    if let Some(allocation) = &report.allocation {
        let sparsities = allocation.layers.iter().map(|layer| 100.0 * layer.sparsity);
        let (least, most) = (sparsities.clone().fold(f64::INFINITY, f64::min), sparsities.fold(0.0, f64::max));
        let chosen = match allocation.trials.iter().find(|trial| trial.chosen).map(|trial| trial.depth_weight) {
            Some(Some(depth_weight)) => format!(", depth weight {depth_weight}"),
            Some(None) => ", no plan being better than the even one".to_owned(),
            None => String::new(),
        };
        text.push_str(&format!("layers have between {least:.1} and {most:.1} % zeros{chosen}\n"));
    }
    let damped = report.sublayers.iter().filter(|entry| entry.damping_raised > 0).count();
    if damped > 0 {
        text.push_str(&format!("damping had to be raised for {damped} sublayers, see report.json\n"));
    }
    let dead: u64 = report.sublayers.iter().map(|entry| u64::from(entry.dead_channels)).sum();
    if dead > 0 {
        text.push_str(&format!("{dead} input channels were never active (summed over sublayers), see report.json\n"));
    }
    if report.totals.retries > 0 {
        text.push_str(&format!("{} leases ended badly and were given again\n", report.totals.retries));
    }
    if report.totals.assistants_lost > 0 {
        let lost = report.totals.assistants_lost;
        text.push_str(&format!("{lost} times a worker that helped with a layer was given up on\n"));
    }
    for LinkTotal { link: LinkUse { kind, declined }, times } in &report.totals.links {
        if let Some(reason) = declined {
            text.push_str(&format!("{times} times workers were joined by {} because {reason}\n", kind.name()));
        }
    }
    if let Some(perplexity) = &report.perplexity {
        text.push_str(&format!(
            "perplexity {:.3} dense → {:.3} pruned  ({} windows of {} tokens)\n",
            perplexity.dense, perplexity.pruned, perplexity.windows, perplexity.sequence_length
        ));
    }
    text.push_str(&format!("checkpoint: {}\nreport: {run_folder}/report.json\n", report.output));
    text.push_str(&format!("next: espalier inspect {}", report.output));
    text
}
