//! Tests of the journal on object stores: of any number of writers one goes on, and what it finds is what was committed.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use espalier_common::ids::{Attempt, LayerIndex, Lease, Unit, WorkerId};
use espalier_common::store::{BlobStore, MemoryStore, ObjectBlobStore, Placed, StoreError};
use proptest::prelude::*;

use super::*;
use crate::schedule::Record;

fn leased(attempt: u32) -> JournalRecord {
    let lease = Lease { unit: Unit::Prune(LayerIndex(0)), worker: WorkerId(1), attempt: Attempt(attempt) };
    JournalRecord::Prune(Record::Leased { lease })
}

/// The records without those that writers begin with.
fn written(records: Vec<JournalRecord>) -> Vec<JournalRecord> {
    records.into_iter().filter(|record| !matches!(record, JournalRecord::TakenOver(_))).collect()
}

fn open_log(store: &Arc<dyn BlobStore>) -> (FencedLog, Vec<JournalRecord>) {
    let (log, records) = FencedLog::open(Arc::clone(store), NAME).unwrap();
    (log, written(records))
}

fn memory() -> Arc<dyn BlobStore> {
    Arc::new(MemoryStore::default())
}

fn flip(store: &dyn BlobStore, name: &str) {
    let mut bytes = store.get(name).unwrap().to_vec();
    bytes[12] ^= 1;
    store.put(name, &bytes).unwrap();
}

#[test]
fn what_was_appended_is_read_again() {
    let stores: [Arc<dyn BlobStore>; 2] = [memory(), Arc::new(ObjectBlobStore::in_memory().unwrap())];
    for store in stores {
        let (mut log, records) = open_log(&store);
        assert!(records.is_empty());
        for attempt in 0..40 {
            log.append(&leased(attempt)).unwrap();
        }
        assert_eq!(written(read_run(store.as_ref()).unwrap()), (0..40).map(leased).collect::<Vec<_>>());
        let names = store.list(NAME).unwrap();
        assert_eq!((names.len(), names[40].as_str()), (41, "journal/00000040"), "one object a record: {names:?}");
        let line = store.get("journal/00000040").unwrap();
        let json = serde_json::to_string(&leased(39)).unwrap();
        assert_eq!(line, format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())), "as a line of the file");
    }
}

#[test]
fn a_damaged_last_record_counts_for_nothing_and_its_writer_is_fenced() {
    let store = memory();
    let (mut first, _) = open_log(&store);
    first.append(&leased(1)).unwrap();
    first.append(&leased(2)).unwrap();
    flip(store.as_ref(), "journal/00000002");
    assert_eq!(written(read_run(store.as_ref()).unwrap()), [leased(1)]);
    let (mut second, records) = open_log(&store);
    assert_eq!(records, [leased(1)]);
    second.append(&leased(3)).unwrap();
    assert!(matches!(first.append(&leased(4)), Err(JournalError::Fenced { index: 3, .. })));
    // What was passed over once is passed over by everybody, wherever the journal ends by now.
    assert_eq!(open_log(&store).1, [leased(1), leased(3)]);
}

#[test]
fn damage_and_gaps_in_the_middle_are_errors_and_fence_nobody() {
    let store = memory();
    let (mut log, _) = open_log(&store);
    (1..4).for_each(|attempt| log.append(&leased(attempt)).unwrap());
    let good = store.get("journal/00000002").unwrap();
    flip(store.as_ref(), "journal/00000002");
    let opened = FencedLog::open::<JournalRecord>(Arc::clone(&store), NAME);
    assert!(matches!(opened, Err(JournalError::Damaged { index: 2, .. })), "{opened:?}");
    store.delete("journal/00000002").unwrap();
    let opened = FencedLog::open::<JournalRecord>(Arc::clone(&store), NAME);
    assert!(matches!(opened, Err(JournalError::Missing { index: 2, .. })), "{opened:?}");
    store.put("journal/00000002", &good).unwrap();
    log.append(&leased(4)).unwrap();
}

#[test]
fn a_record_of_another_version_is_told_as_such() {
    let store = memory();
    store
        .put("journal/00000000", format!("{:08x} {{\"later\":1}}\n", crc32fast::hash(b"{\"later\":1}")).as_bytes())
        .unwrap();
    assert!(matches!(read_run(store.as_ref()), Err(JournalError::Foreign { index: 0, .. })));
}

#[test]
fn the_loser_is_told_who_has_taken_over_and_never_appends_again() {
    let store = memory();
    let (mut first, _) = open_log(&store);
    let (mut second, _) = open_log(&store);
    for _ in 0..2 {
        let error = first.append(&leased(1)).unwrap_err();
        let by = format!(":{}:", std::process::id());
        assert!(matches!(&error, JournalError::Fenced { by: writer, .. } if writer.contains(&by)), "{error}");
        assert!(error.to_string().contains("another coordinator has taken over memory:/journal"), "{error}");
    }
    second.append(&leased(2)).unwrap();
    assert_eq!(written(read_run(store.as_ref()).unwrap()), [leased(2)]);
}

/// Fails operations by count, before or after the store carries them out.
#[derive(Debug)]
struct FlakyStore {
    store: MemoryStore,
    /// Puts until the next fault.
    due: AtomicUsize,
    /// How many fail then.
    faults: AtomicUsize,
    /// Whether the store carries a failing put out: only the answer is lost.
    is_carried_out: bool,
}

impl FlakyStore {
    fn new(due: usize, faults: usize, is_carried_out: bool) -> Arc<Self> {
        let (due, faults) = (AtomicUsize::new(due), AtomicUsize::new(faults));
        Arc::new(Self { store: MemoryStore::default(), due, faults, is_carried_out })
    }

    fn fails(&self) -> bool {
        let count = |counter: &AtomicUsize| {
            counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
        };
        !count(&self.due) && count(&self.faults)
    }
}

impl BlobStore for FlakyStore {
    fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.put(name, bytes)
    }

    fn put_if_absent(&self, name: &str, bytes: &[u8]) -> Result<Placed, StoreError> {
        if !self.fails() {
            return self.store.put_if_absent(name, bytes);
        }
        if self.is_carried_out {
            self.store.put_if_absent(name, bytes)?;
        }
        let (url, name, reason) = (self.url().to_owned(), name.to_owned(), "503".to_owned());
        Err(StoreError::Unavailable { url, name, reason, unreachable: false })
    }

    fn get(&self, name: &str) -> Result<Bytes, StoreError> {
        self.store.get(name)
    }

    fn get_range(&self, name: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.store.get_range(name, range)
    }

    fn size(&self, name: &str) -> Result<u64, StoreError> {
        self.store.size(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.store.list(prefix)
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.store.delete(name)
    }

    fn sweep(&self) -> Result<(), StoreError> {
        self.store.sweep()
    }

    fn url(&self) -> &str {
        self.store.url()
    }

    fn directory(&self) -> Option<&Path> {
        None
    }
}

#[test]
fn a_lost_answer_is_no_second_writer() {
    for is_carried_out in [true, false] {
        let flaky = FlakyStore::new(2, 2, is_carried_out);
        let store: Arc<dyn BlobStore> = Arc::clone(&flaky) as _;
        let (mut log, _) = open_log(&store);
        (1..4).for_each(|attempt| log.append(&leased(attempt)).unwrap());
        assert_eq!(flaky.faults.load(Ordering::Relaxed), 0, "the faults fired");
        assert_eq!(written(read_run(store.as_ref()).unwrap()), [leased(1), leased(2), leased(3)]);
    }
}

#[test]
fn nothing_stands_behind_a_record_that_may_not_be_there() {
    for (is_carried_out, found) in [(true, vec![leased(1), leased(2)]), (false, vec![leased(1)])] {
        let flaky = FlakyStore::new(2, 100, is_carried_out);
        let store: Arc<dyn BlobStore> = Arc::clone(&flaky) as _;
        let (mut log, _) = open_log(&store);
        log.append(&leased(1)).unwrap();
        assert!(matches!(log.append(&leased(2)), Err(JournalError::Store(_))));
        assert!(matches!(log.append(&leased(3)), Err(JournalError::Unsettled { index: 2, .. })));
        flaky.faults.store(0, Ordering::Relaxed);
        assert_eq!(open_log(&store).1, found);
    }
}

/// What one of several writers does next.
#[derive(Debug, Clone)]
enum Step {
    Open(usize),
    Append(usize),
    /// Its next put is carried out, but the answer is lost.
    LoseAnswer(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let writer = 0..3usize;
    let step = prop_oneof![
        1 => writer.clone().prop_map(Step::Open),
        6 => writer.clone().prop_map(Step::Append),
        1 => writer.prop_map(Step::LoseAnswer),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn of_interleaved_writers_one_succeeds_at_a_time(steps in steps()) {
        let flaky = FlakyStore::new(usize::MAX, 0, true);
        let store: Arc<dyn BlobStore> = Arc::clone(&flaky) as _;
        let mut logs: [Option<FencedLog>; 3] = [None, None, None];
        let (mut committed, mut newest, mut attempt) = (Vec::new(), None, 0);
        for step in steps {
            match step {
                Step::Open(writer) => {
                    let (log, records) = open_log(&store);
                    prop_assert_eq!(&records, &committed, "a writer finds what was committed");
                    logs[writer] = Some(log);
                    newest = Some(writer);
                }
                Step::Append(writer) | Step::LoseAnswer(writer) => {
                    let Some(log) = &mut logs[writer] else { continue };
                    if matches!(step, Step::LoseAnswer(_)) {
                        flaky.due.store(0, Ordering::Relaxed);
                        flaky.faults.store(1, Ordering::Relaxed);
                    }
                    attempt += 1;
                    let appended = log.append(&leased(attempt));
                    flaky.due.store(usize::MAX, Ordering::Relaxed);
                    match appended {
                        Ok(()) => {
                            prop_assert_eq!(newest, Some(writer), "only the newest writer appends");
                            committed.push(leased(attempt));
                        }
                        Err(error) => {
                            let is_fenced = matches!(error, JournalError::Fenced { .. });
                            prop_assert!(is_fenced && newest != Some(writer), "{}", error);
                        }
                    }
                }
            }
        }
        prop_assert_eq!(written(read_run(store.as_ref()).unwrap()), committed);
    }
}
