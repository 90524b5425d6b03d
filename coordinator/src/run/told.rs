//! What those who look at a run are told of it: its job, what was done before, and how long its records take.

use espalier_common::clock::Stopwatch;
use espalier_common::ids::Unit;
use espalier_common::job::JobSpec;
use espalier_common::report::{Outcome, PhaseSeconds};

use super::prune_records;
use crate::error::RunError;
use crate::events::{About, EventLog};
use crate::journal::{Journal, JournalError, JournalRecord};
use crate::report::{self, SublayerEntry};
use crate::schedule::Record;

/// What people are told of a job.
pub(crate) fn about(job: &JobSpec) -> Result<About, RunError> {
    Ok(About {
        model: job.model.source.clone(),
        method: job.method.name.clone(),
        pattern: job.pattern()?.to_string(),
        propagation: job.propagation.mode.name().to_owned(),
        samples: job.calibration.samples,
        sequence_length: job.calibration.sequence_length,
        output: job.output.uri.clone(),
    })
}

/// Sublayers and seconds of the layers that an earlier life committed.
pub(super) fn pruned_before(past: &[JournalRecord]) -> (Vec<SublayerEntry>, Vec<PhaseSeconds>) {
    let (mut entries, mut seconds) = (Vec::new(), Vec::new());
    for record in prune_records(past) {
        let Record::Committed { lease, outcome: Outcome::Pruned { sublayers, phases, .. } } = record else { continue };
        if let Unit::Prune(layer) = lease.unit {
            entries.extend(sublayers.iter().map(|sublayer| report::entry(layer.0, lease.worker, sublayer)));
            seconds.extend(phases.iter().cloned());
        }
    }
    (entries, seconds)
}

/// A journal that also keeps what it wrote.
pub(super) struct Remembering<'a> {
    pub(super) journal: &'a mut dyn Journal,
    pub(super) past: &'a mut Vec<JournalRecord>,
    pub(super) events: &'a EventLog,
}

/// Appends a record, and tells how long that took.
pub(super) fn append_timed(
    journal: &mut dyn Journal,
    record: &JournalRecord,
    events: &EventLog,
) -> Result<(), JournalError> {
    let watch = Stopwatch::start();
    let appended = journal.append(record);
    events.note_append(watch.seconds(), appended.is_ok());
    appended
}

impl Journal for Remembering<'_> {
    fn append(&mut self, record: &JournalRecord) -> Result<(), JournalError> {
        append_timed(self.journal, record, self.events)?;
        self.past.push(record.clone());
        Ok(())
    }
}
