//! `status` and `cancel` of a run by what its store keeps, without asking a coordinator.

use espalier_common::config;
use espalier_common::ids::Unit;

use super::{CliError, screen, table};
use crate::error::RunError;
use crate::journal::{self, JournalRecord, RunCreated};
use crate::schedule::Record;

/// What a journal tells of a run at a glance.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
struct Glance {
    run: String,
    model: String,
    committed: usize,
    layers: Option<usize>,
    state: String,
    /// Who wrote last, on an object store.
    #[serde(skip_serializing_if = "Option::is_none")]
    writer: Option<String>,
}

impl Glance {
    fn of(records: &[JournalRecord]) -> Option<Self> {
        let mut glance: Option<Self> = None;
        let mut writer = None;
        for record in records {
            if let (JournalRecord::Created(created), None) = (record, &glance) {
                let RunCreated { run, job, .. } = created.as_ref();
                let (run, model, state) = (run.to_string(), job.model.source.clone(), "unfinished".to_owned());
                glance = Some(Self { run, model, committed: 0, layers: None, state, writer: None });
            }
            let Some(glance) = &mut glance else {
                writer = taken_by(record).or(writer);
                continue;
            };
            match record {
                JournalRecord::TakenOver(_) => {
                    writer = taken_by(record).or(writer);
                    glance.state = "unfinished".to_owned();
                }
                JournalRecord::Planned { patterns, .. } => glance.layers = Some(patterns.len()),
                JournalRecord::Prune(Record::Committed { lease, .. }) if matches!(lease.unit, Unit::Prune(_)) => {
                    glance.committed += 1;
                }
                JournalRecord::Finished { .. } => glance.state = "done".to_owned(),
                JournalRecord::Stopped { reason, .. } => glance.state.clone_from(reason),
                _ => {}
            }
        }
        glance.map(|glance| Self { writer, ..glance })
    }
}

fn taken_by(record: &JournalRecord) -> Option<String> {
    match record {
        JournalRecord::TakenOver(taken) => Some(taken.writer.clone()),
        _ => None,
    }
}

/// Shows how far the run at `run_url` is.
pub(crate) fn status(run_url: &str, json: bool) -> Result<(), CliError> {
    let store = config::open_store(run_url).map_err(RunError::from)?;
    let records = journal::read_run(store.as_ref()).map_err(RunError::from)?;
    let glance = Glance::of(&records).ok_or_else(|| RunError::Headless(run_url.to_owned()))?;
    if json {
        screen::out(&serde_json::to_string_pretty(&glance).expect("it is plain data"));
        return Ok(());
    }
    let mut runs = table::table(&["run", "model", "layers", "state"]);
    let layers = glance.layers.map_or_else(String::new, |layers| format!("{}/{layers}", glance.committed));
    runs.add_row([glance.run, glance.model, layers, glance.state]);
    screen::out(&runs.to_string());
    Ok(())
}

/// Stops the run at `run_url`: on an object store it is taken over, so that its coordinator ends at the next record; in a folder
/// the process that holds it is named.
pub(crate) fn cancel(run_url: &str) -> Result<(), CliError> {
    let store = config::open_store(run_url).map_err(RunError::from)?;
    let records = journal::read_run(store.as_ref()).map_err(RunError::from)?;
    let Some(glance) = Glance::of(&records) else { return Err(RunError::Headless(run_url.to_owned()).into()) };
    if glance.state == "done" {
        return Err(CliError { message: format!("{run_url} is done"), code: crate::error::exit::REJECTED });
    }
    let (mut journal, _) = journal::open(&store).map_err(RunError::from)?;
    let stopped = JournalRecord::Stopped {
        reason: "cancelled".to_owned(),
        seconds: 0.0,
        journal_seconds: 0.0,
        exit_code: Some(crate::error::exit::INTERRUPTED),
    };
    Ok(journal.append(&stopped).map_err(RunError::from)?)
}

#[cfg(test)]
mod tests {
    use espalier_common::job::JobSpec;

    use super::*;
    use crate::journal::TakenOver;

    #[test]
    fn a_journal_tells_how_far_a_run_is_and_who_wrote_last() {
        let job: JobSpec = serde_json::from_value(serde_json::json!({
            "model": {"source": "m"}, "calibration": {"source": "c"}, "output": {"uri": "o"}
        }))
        .unwrap();
        let taken = |writer: &str| JournalRecord::TakenOver(TakenOver { writer: writer.to_owned(), at: 0, void: None });
        let digest = espalier_common::digest::Digest::of(b"");
        let created = JournalRecord::Created(Box::new(RunCreated {
            run: espalier_common::ids::RunId("r".to_owned()),
            job,
            tokens: espalier_common::report::Artifact { name: "t".to_owned(), sha256: digest, bytes: 0 },
            model_fingerprint: digest,
            created: 0,
        }));
        let stopped = JournalRecord::Stopped {
            reason: "interrupted".to_owned(),
            seconds: 1.0,
            journal_seconds: 0.0,
            exit_code: None,
        };
        let mut records = vec![taken("a"), created, stopped];
        let glance = Glance::of(&records).unwrap();
        assert_eq!((glance.state.as_str(), glance.writer.as_deref()), ("interrupted", Some("a")));
        records.push(taken("b"));
        let glance = Glance::of(&records).unwrap();
        assert_eq!((glance.state.as_str(), glance.writer.as_deref()), ("unfinished", Some("b")));
        assert_eq!(Glance::of(&records[..1]), None);
    }
}
