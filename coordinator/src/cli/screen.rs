//! What a person sees while something runs: bars on a terminal, plain lines elsewhere, nothing with `--json`.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use espalier_common::ids::{Unit, WorkerId};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::events::{Phase, RunEvent};

/// Prints the one line a failed command ends with.
#[allow(clippy::print_stderr, reason = "this is the place")]
pub(crate) fn error_line(message: &str) {
    eprintln!("error: {message}");
}

/// Says where something is while a command runs; standard output is for its result.
#[allow(clippy::print_stderr, reason = "this is the place")]
pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

/// Prints a result. A reader that went away (`| head`) is no error.
pub(crate) fn out(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Shows the events of a run.
pub(crate) struct Screen {
    kind: Kind,
    names: BTreeMap<WorkerId, String>,
}

enum Kind {
    Silent,
    Lines { layers: usize, committed: usize },
    Bars(Box<Bars>),
}

struct Bars {
    all: MultiProgress,
    overall: ProgressBar,
    workers: BTreeMap<WorkerId, ProgressBar>,
    /// Layers committed in an earlier life: where the bar of the pruning begins.
    committed: u64,
    phase: Option<Phase>,
}

impl Screen {
    /// A screen that fits what stderr is; silent with `--json`.
    pub(crate) fn new(silent: bool) -> Self {
        let kind = if silent {
            Kind::Silent
        } else if std::io::stderr().is_terminal() {
            let all = MultiProgress::new();
            let overall = all.add(ProgressBar::new(0));
            overall.set_style(style("{msg:18} [{bar:32}] {pos}/{len}  {elapsed_precise} eta {eta}"));
            overall.enable_steady_tick(Duration::from_millis(250));
            Kind::Bars(Box::new(Bars { all, overall, workers: BTreeMap::new(), committed: 0, phase: None }))
        } else {
            Kind::Lines { layers: 0, committed: 0 }
        };
        Self { kind, names: BTreeMap::new() }
    }

    /// Shows one event.
    pub(crate) fn show(&mut self, event: &RunEvent) {
        if let RunEvent::WorkerJoined { worker, name } = event {
            self.names.insert(*worker, name.clone());
        }
        let names = &self.names;
        match &mut self.kind {
            Kind::Silent => {}
            Kind::Lines { layers, committed } => lines(event, names, layers, committed),
            Kind::Bars(bars) => bars.show(event, names),
        }
    }

    /// Clears the bars.
    pub(crate) fn clear(&self) {
        if let Kind::Bars(bars) = &self.kind {
            // A terminal that cannot be cleared is not worth failing for.
            let _ = bars.all.clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ ")
}

fn name(names: &BTreeMap<WorkerId, String>, worker: WorkerId) -> String {
    names.get(&worker).cloned().unwrap_or_else(|| format!("worker {worker}"))
}

#[allow(clippy::print_stderr, reason = "this is the place")]
fn lines(event: &RunEvent, names: &BTreeMap<WorkerId, String>, layers: &mut usize, committed: &mut usize) {
    match event {
        RunEvent::Opened { run, url, committed: before, .. } => {
            *committed = *before;
            let resumed = if *before > 0 { format!(", {before} layers committed before") } else { String::new() };
            eprintln!("run {run} in {url}{resumed}");
        }
        RunEvent::Phase { phase } => {
            if let Phase::Prune { layers: total } = phase {
                *layers = *total;
            }
            eprintln!("{}", phase.told());
        }
        RunEvent::Strategy(choice) => {
            if let Some(told) = choice.told() {
                eprintln!("{told}");
            }
        }
        RunEvent::WorkerLost { worker, name, reason } => eprintln!("worker {worker} ({name}) is lost: {reason}"),
        RunEvent::Committed { unit: Unit::Prune(layer), worker, mean_error: Some(error), .. } => {
            *committed += 1;
            eprintln!("layer {layer} pruned by {}: mean error {error:.5} ({committed}/{layers})", name(names, *worker));
        }
        RunEvent::Failed { unit, worker, reason, .. } => {
            eprintln!("{unit} failed on {}: {reason}", name(names, *worker))
        }
        _ => {}
    }
}

impl Bars {
    /// Whether a unit is one of those that the bar counts: a forward pass is only a means while layers are pruned.
    fn counts(&self, unit: Unit) -> bool {
        match unit {
            Unit::Prune(_) => true,
            Unit::Forward(_) => matches!(self.phase, Some(Phase::Survey { .. })),
            Unit::Evaluate(_) => matches!(self.phase, Some(Phase::Try { .. })),
        }
    }

    fn show(&mut self, event: &RunEvent, names: &BTreeMap<WorkerId, String>) {
        match event {
            RunEvent::Opened { committed, .. } => self.committed = *committed as u64,
            RunEvent::Phase { phase } => {
                let (title, total) = phase.title();
                self.phase = Some(*phase);
                self.overall.set_position(match phase {
                    Phase::Prune { .. } => self.committed,
                    Phase::AwaitWorkers { here, .. } => *here as u64,
                    _ => 0,
                });
                self.overall.set_message(title);
                self.overall.set_length(total as u64);
                self.overall.reset_eta();
            }
            RunEvent::Committed { unit, .. } if self.counts(*unit) => self.overall.inc(1),
            RunEvent::Progress { unit, worker, phase, done, total } => {
                let bar = self.workers.entry(*worker).or_insert_with(|| {
                    let bar = self.all.add(ProgressBar::new(0));
                    bar.set_style(style("{prefix:18} [{bar:32}] {msg}"));
                    bar.set_prefix(name(names, *worker));
                    bar
                });
                bar.set_length(u64::from(*total));
                bar.set_position(u64::from(*done));
                bar.set_message(format!("{unit}: {phase}"));
            }
            RunEvent::WorkerLost { worker, name, reason } => {
                if let Some(bar) = self.workers.remove(worker) {
                    bar.finish_and_clear();
                }
                let _ = self.all.println(format!("worker {worker} ({name}) is lost: {reason}"));
            }
            RunEvent::Strategy(choice) => {
                if let Some(told) = choice.told() {
                    let _ = self.all.println(told);
                }
            }
            RunEvent::Failed { unit, worker, reason, .. } => {
                let _ = self.all.println(format!("{unit} failed on {}: {reason}", name(names, *worker)));
            }
            _ => {}
        }
    }
}
