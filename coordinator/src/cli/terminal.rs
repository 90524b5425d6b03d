//! A run as text that fits a terminal. Pure.

use std::fmt::Write as _;

use crate::view::{Head, RunView, State};

/// Characters of a progress bar.
const BAR: usize = 32;
/// The widest row of layers; a deeper model's neighbours share a character.
const ROW: usize = 64;
const SHADES: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

fn clock(millis: u64) -> String {
    let seconds = millis / 1000;
    format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// What comes from outside must not move the cursor.
fn plain(text: &str) -> String {
    text.chars().map(|character| if character.is_control() { ' ' } else { character }).collect()
}

/// A run at `now` (milliseconds since 1970).
pub(crate) fn run(view: &RunView, now: u64) -> String {
    let head = view.head();
    let mut text = String::new();
    // Writing to a string does not fail.
    if let Some(about) = &head.about {
        let _ = writeln!(text, "{}", plain(&format!("{}  {} to {}", about.model, about.method, about.pattern)));
    }
    progress(&mut text, head, now);
    errors(&mut text, view);
    for lane in view.workers().filter(|lane| lane.here) {
        let unit = view.open().iter().find(|span| span.worker == lane.worker);
        let unit = unit.map_or_else(|| "idle".to_owned(), |span| format!("{} {}", span.kind, span.index));
        let step = match &lane.doing {
            Some(step) if lane.total > 0 => format!(": {step} {}/{}", lane.done, lane.total),
            Some(step) => format!(": {step}"),
            None => String::new(),
        };
        let _ = writeln!(text, "  {:<18} {}", plain(&lane.name), plain(&format!("{unit}{step}")));
    }
    totals(&mut text, head);
    text.trim_end().to_owned()
}

fn progress(text: &mut String, head: &Head, now: u64) {
    let elapsed = head.started.map(|started| clock(head.ended.unwrap_or(now).saturating_sub(started)));
    let elapsed = elapsed.unwrap_or_else(|| "–".to_owned());
    let title = match head.state {
        State::Queued => "queued",
        State::Done => "done",
        State::Failed => "ended badly",
        State::Running => head.phases.last().map_or("running", |phase| phase.title.as_str()),
    };
    let _ = write!(text, "{title:<18}");
    if let Some(layers) = head.layers {
        let full = (head.committed * BAR).checked_div(layers).unwrap_or(0).min(BAR);
        let _ = write!(text, " [{}{}] {}/{layers}", "━".repeat(full), " ".repeat(BAR - full), head.committed);
    }
    let _ = write!(text, "  {elapsed}");
    if let Some(eta) = head.eta {
        let _ = write!(text, "  {} left", clock(eta.saturating_sub(now)));
    }
    text.push('\n');
}

/// One row a kind of sublayer, one character a layer: the higher, the larger the error, by its logarithm.
fn errors(text: &mut String, view: &RunView) {
    let head = view.head();
    let layers =
        head.layers.unwrap_or(0).max(view.layers().iter().map(|layer| layer.layer as usize + 1).max().unwrap_or(0));
    let all =
        || view.layers().iter().flat_map(|layer| &layer.cells).map(|cell| cell.error).filter(|error| *error > 0.0);
    let mut sorted: Vec<f64> = all().collect();
    sorted.sort_by(f64::total_cmp);
    // A few that lose next to nothing would leave one height to all others.
    let (least, most) = (sorted.get(sorted.len() / 40).copied().unwrap_or(0.0), sorted.last().copied().unwrap_or(0.0));
    if layers == 0 || most <= 0.0 {
        return;
    }
    let width = layers.min(ROW);
    for kind in &head.kinds {
        let mut row = vec![0.0_f64; width];
        let (mut sum, mut count) = (0.0, 0);
        for layer in view.layers() {
            for cell in layer.cells.iter().filter(|cell| cell.kind == *kind) {
                let place = &mut row[layer.layer as usize * width / layers];
                *place = place.max(cell.error);
                (sum, count) = (sum + cell.error, count + 1);
            }
        }
        let span = (most / least).ln().max(f64::MIN_POSITIVE);
        let shade = |error: &f64| match *error {
            // What is below the least becomes 0.
            error if error > 0.0 => SHADES[(((error / least).ln() / span * 7.0).round() as usize).min(7)],
            _ => '·',
        };
        let row: String = row.iter().map(shade).collect();
        let mean = sum / f64::from(count.max(1));
        let _ = writeln!(text, "  {:<18} {row}  mean {mean:.5}", plain(kind));
    }
    let _ = writeln!(text, "  {:<18} error {least:.5} ▁ … █ {most:.5}", "");
}

fn totals(text: &mut String, head: &Head) {
    let mut phases: Vec<_> = head.seconds_by_phase.iter().filter(|(_, seconds)| **seconds >= 0.05).collect();
    phases.sort_by(|one, other| other.1.total_cmp(one.1));
    if !phases.is_empty() {
        let phases: Vec<_> = phases.iter().map(|(phase, seconds)| format!("{} {seconds:.1}", plain(phase))).collect();
        let _ = writeln!(text, "  worker seconds: {}", phases.join(", "));
    }
    if head.elements > 0 {
        let sparsity = 100.0 * head.zeros as f64 / head.elements as f64;
        let _ = write!(text, "  {sparsity:.2} % zeros");
        let counts = [
            (head.retries, "leases tried again"),
            (head.workers_lost, "workers lost"),
            (head.assistants_lost, "helpers given up on"),
        ];
        for (count, what) in counts.iter().filter(|(count, _)| *count > 0) {
            let _ = write!(text, ", {count} {what}");
        }
        text.push('\n');
    }
    if let Some(perplexity) = &head.perplexity {
        let _ = writeln!(text, "  perplexity {:.3} dense → {:.3} pruned", perplexity.dense, perplexity.pruned);
    }
    if let (State::Failed, Some(reason)) = (head.state, &head.reason) {
        let _ = writeln!(text, "  {}", plain(reason));
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::ids::{LayerIndex, Unit, WorkerId};

    use super::*;
    use crate::events::{Phase, RunEvent};

    #[test]
    fn a_run_is_drawn_with_its_progress_and_without_foreign_control_characters() {
        let mut view = RunView::default();
        view.apply(0, &RunEvent::Phase { phase: Phase::Prune { layers: 4 } });
        view.apply(0, &RunEvent::WorkerJoined { worker: WorkerId(1), name: "bad\u{1b}[2Jname".to_owned() });
        let unit = Unit::Prune(LayerIndex(0));
        let started = RunEvent::Started { unit, worker: WorkerId(1) };
        view.apply(0, &started);
        let (phase, done, total) = ("solve".to_owned(), 3, 7);
        view.apply(500, &RunEvent::Progress { unit, worker: WorkerId(1), phase, done, total });
        let text = run(&view, 61_000);
        assert!(text.contains("pruning") && text.contains("0/4") && text.contains("0:01:01"), "{text}");
        assert!(text.contains("prune 0: solve 3/7"), "{text}");
        assert!(text.chars().all(|character| character == '\n' || !character.is_control()), "{text:?}");
    }
}
