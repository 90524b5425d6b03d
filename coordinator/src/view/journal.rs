//! A run's journal, told as events: for those who look at a run that belongs to another process. Pure.

use crate::driver::committed;
use crate::error::exit;
use crate::events::{Phase, RunEvent};
use crate::journal::JournalRecord;
use crate::report;
use crate::run::about;
use crate::schedule::Record;

/// What happened between the first `seen` records and the last: what the journal tells of it. Workers have no names there.
pub fn events(records: &[JournalRecord], seen: usize, url: &str) -> Vec<RunEvent> {
    let mut events = Vec::new();
    for (index, record) in records.iter().enumerate().skip(seen) {
        match record {
            JournalRecord::TakenOver(_)
            | JournalRecord::Computing { .. }
            | JournalRecord::Shared { .. }
            | JournalRecord::Workers(_) => {}
            JournalRecord::Created(created) => events.push(RunEvent::Opened {
                run: created.run.clone(),
                url: url.to_owned(),
                committed: 0,
                about: about(&created.job).ok().map(Box::new),
                sublayers: Vec::new(),
                phases: Vec::new(),
            }),
            JournalRecord::Planned { outline, patterns } => {
                let job = records.iter().find_map(|record| match record {
                    JournalRecord::Created(created) => Some(&created.job),
                    _ => None,
                });
                if let Some(Ok(pattern)) = job.map(|job| report::overall_pattern(job, outline)) {
                    events.push(RunEvent::Planned { pattern: pattern.to_string() });
                }
                events.push(RunEvent::Phase { phase: Phase::Prune { layers: patterns.len() } });
            }
            JournalRecord::Strategy(choice) => events.push(RunEvent::Strategy(choice.clone())),
            JournalRecord::Survey(record) | JournalRecord::Prune(record) | JournalRecord::Evaluate { record, .. } => {
                events.push(scheduled(record));
            }
            JournalRecord::Assembled { .. } => events.push(RunEvent::Phase { phase: Phase::Assemble }),
            JournalRecord::Finished { .. } => {
                if let Ok(report) = report::build(&records[..=index]) {
                    events.push(RunEvent::Finished { report: Box::new(report) });
                }
            }
            // One that something follows was taken up again.
            JournalRecord::Stopped { reason, exit_code, .. } if index + 1 == records.len() => {
                let exit_code = exit_code.unwrap_or(exit::INTERRUPTED);
                events.push(RunEvent::Ended { reason: reason.clone(), exit_code });
            }
            JournalRecord::Stopped { .. } => {}
        }
    }
    events
}

fn scheduled(record: &Record) -> RunEvent {
    match record {
        Record::Leased { lease } => RunEvent::Started { unit: lease.unit, worker: lease.worker },
        Record::Committed { lease, outcome } => committed(lease, outcome),
        Record::Failed { lease, fault } => RunEvent::Failed {
            unit: lease.unit,
            worker: lease.worker,
            reason: fault.message.clone(),
            class: Some(fault.class),
        },
    }
}
