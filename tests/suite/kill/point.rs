//! Where a run is disturbed: behind every kind of record, and in the middle of every kind of transfer.

use espalier_coordinator::journal::JournalRecord;
use espalier_coordinator::schedule::Record;
use harness::fault::{Deed, Fault, Place};

use super::case::Victim;

/// An enumeration that knows its variants.
macro_rules! listed {
    ($(#[$about:meta])* $name:ident { $($variant:ident),+ $(,)? }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum $name { $($variant),+ }
        impl $name {
            /// All of them.
            pub(super) const ALL: &[Self] = &[$(Self::$variant),+];
        }
    };
}

listed! {
    /// The kinds of records of a journal.
    Kind {
        Created,
        Computing,
        Planned,
        Strategy,
        SurveyLeased,
        SurveyCommitted,
        SurveyFailed,
        PruneLeased,
        PruneCommitted,
        PruneFailed,
        Shared,
        EvaluateLeased,
        EvaluateCommitted,
        EvaluateFailed,
        Assembled,
        Workers,
        Finished,
        Stopped,
    }
}

listed! {
    /// What is carried from one place to another.
    Transfer {
        JobFile,
        Fingerprint,
        TokenBlock,
        EvaluationTokens,
        JournalRecord,
        HiddenStatesSent,
        HiddenStatesReceived,
        Artifact,
        StoredBoundary,
        Checkpoint,
        Report,
    }
}

impl Kind {
    /// The kind of a record; `None` for one that only journals on an object store have, where suite/s3 kills. A new kind of
    /// record does not compile until it is in the matrix.
    pub(super) fn of(record: &JournalRecord) -> Option<Self> {
        Some(match record {
            JournalRecord::TakenOver(_) => return None,
            JournalRecord::Created(_) => Self::Created,
            JournalRecord::Computing { .. } => Self::Computing,
            JournalRecord::Planned { .. } => Self::Planned,
            JournalRecord::Strategy(_) => Self::Strategy,
            JournalRecord::Survey(Record::Leased { .. }) => Self::SurveyLeased,
            JournalRecord::Survey(Record::Committed { .. }) => Self::SurveyCommitted,
            JournalRecord::Survey(Record::Failed { .. }) => Self::SurveyFailed,
            JournalRecord::Prune(Record::Leased { .. }) => Self::PruneLeased,
            JournalRecord::Prune(Record::Committed { .. }) => Self::PruneCommitted,
            JournalRecord::Prune(Record::Failed { .. }) => Self::PruneFailed,
            JournalRecord::Shared { .. } => Self::Shared,
            JournalRecord::Evaluate { record: Record::Leased { .. }, .. } => Self::EvaluateLeased,
            JournalRecord::Evaluate { record: Record::Committed { .. }, .. } => Self::EvaluateCommitted,
            JournalRecord::Evaluate { record: Record::Failed { .. }, .. } => Self::EvaluateFailed,
            JournalRecord::Assembled { .. } => Self::Assembled,
            JournalRecord::Workers(_) => Self::Workers,
            JournalRecord::Finished { .. } => Self::Finished,
            JournalRecord::Stopped { .. } => Self::Stopped,
        })
    }

    /// How the journal spells it, and which of its kind is waited for.
    pub(super) fn spelled(self) -> (&'static str, u32) {
        match self {
            Self::Created => ("{\"created\":", 1),
            Self::Computing => ("{\"computing\":", 1),
            Self::Planned => ("{\"planned\":", 1),
            Self::Strategy => ("{\"strategy\":", 1),
            Self::SurveyLeased => ("{\"survey\":{\"leased\":", 2),
            Self::SurveyCommitted => ("{\"survey\":{\"committed\":", 2),
            Self::SurveyFailed => ("{\"survey\":{\"failed\":", 1),
            Self::PruneLeased => ("{\"prune\":{\"leased\":", 3),
            Self::PruneCommitted => ("{\"prune\":{\"committed\":", 2),
            Self::PruneFailed => ("{\"prune\":{\"failed\":", 1),
            Self::Shared => ("{\"shared\":", 1),
            Self::EvaluateLeased => ("\"record\":{\"leased\":", 1),
            Self::EvaluateCommitted => ("\"record\":{\"committed\":", 1),
            Self::EvaluateFailed => ("\"record\":{\"failed\":", 1),
            Self::Assembled => ("{\"assembled\":", 1),
            Self::Workers => ("{\"workers\":", 1),
            Self::Finished => ("{\"finished\":", 1),
            Self::Stopped => ("{\"stopped\":", 1),
        }
    }
}

/// One place where a run is disturbed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Point {
    /// Right behind a record of this kind, before anything follows it.
    Behind(Kind),
    /// In the middle of this.
    During(Transfer),
}

const JOURNAL: &str = "/run/journal";
const COORDINATOR: &str = "espalier";
const WORKER: &str = "espalier-worker";
/// Less than the hidden states of the matrix' jobs, and more than anything else that a worker sends or receives.
const HIDDEN_STATES_BYTES: u32 = 100_000;

fn behind(kind: Kind) -> Fault {
    let (text, number) = kind.spelled();
    Fault { program: COORDINATOR, place: Place::Synced { file: JOURNAL, text, number }, deed: Deed::Stop }
}

fn during_write(program: &'static str, file: &'static str, number: u32) -> Fault {
    Fault { program, place: Place::Written { file, text: "", number }, deed: Deed::Stop }
}

impl Point {
    /// All of them.
    pub(super) fn all() -> Vec<Self> {
        let behind = Kind::ALL.iter().map(|kind| Self::Behind(*kind));
        behind.chain(Transfer::ALL.iter().map(|transfer| Self::During(*transfer))).collect()
    }

    /// The faults that bring a run there. The last one stops the program at the point.
    pub(super) fn faults(self) -> Vec<Fault> {
        let fail = |place| Fault { program: WORKER, place, deed: Deed::Fail };
        match self {
            // Its artifact finds no space, its peer hangs up, its windows cannot be read: then it says so.
            Self::Behind(kind @ Kind::PruneFailed) => {
                vec![fail(Place::Written { file: "/layers/.put-", text: "", number: 1 }), behind(kind)]
            }
            Self::Behind(kind @ Kind::SurveyFailed) => {
                vec![fail(Place::Sent { bytes: HIDDEN_STATES_BYTES }), behind(kind)]
            }
            // The first block that a worker reads is that of the calibration.
            Self::Behind(kind @ Kind::EvaluateFailed) => {
                vec![fail(Place::Read { file: "/run/tokens/", number: 2 }), behind(kind)]
            }
            // Where it stops first, it is interrupted.
            Self::Behind(kind @ Kind::Stopped) => vec![behind(Kind::PruneCommitted), behind(kind)],
            Self::Behind(kind) => vec![behind(kind)],
            Self::During(transfer) => vec![match transfer {
                Transfer::JobFile => during_write(COORDINATOR, "/run/.put-", 1),
                Transfer::Fingerprint => during_write(COORDINATOR, "/run/.put-", 2),
                Transfer::Report => during_write(COORDINATOR, "/run/.put-", 3),
                Transfer::TokenBlock => during_write(COORDINATOR, "/run/tokens/.put-", 1),
                Transfer::EvaluationTokens => during_write(COORDINATOR, "/run/tokens/.put-", 2),
                Transfer::JournalRecord => {
                    let (text, number) = Kind::PruneCommitted.spelled();
                    let place = Place::Written { file: JOURNAL, text, number };
                    Fault { program: COORDINATOR, place, deed: Deed::Stop }
                }
                Transfer::HiddenStatesSent => {
                    Fault { program: WORKER, place: Place::Sent { bytes: HIDDEN_STATES_BYTES }, deed: Deed::Stop }
                }
                Transfer::HiddenStatesReceived => {
                    Fault { program: WORKER, place: Place::Received { bytes: HIDDEN_STATES_BYTES }, deed: Deed::Stop }
                }
                Transfer::Artifact => during_write(WORKER, "/layers/.put-", 2),
                Transfer::StoredBoundary => during_write(WORKER, "/activations/", 9),
                Transfer::Checkpoint => during_write(COORDINATOR, "/.out.partial-", 3),
            }],
        }
    }

    /// Whether a run stops there with workers on this machine as the others.
    pub(super) fn has(self, victim: Victim, is_cluster: bool) -> bool {
        match (self, victim) {
            // On one machine, workers are started once the run is open.
            (
                Self::Behind(Kind::Created)
                | Self::During(Transfer::JobFile | Transfer::Fingerprint | Transfer::TokenBlock),
                Victim::Worker,
            ) => is_cluster,
            // A service that was interrupted ends; which of its workers lives then is all the same to it.
            (Self::Behind(Kind::Stopped), Victim::Worker) => !is_cluster,
            _ => true,
        }
    }

    /// Whether the job must look at the dense model first.
    pub(super) fn needs_survey(self) -> bool {
        matches!(self, Self::Behind(Kind::SurveyLeased | Kind::SurveyCommitted | Kind::SurveyFailed))
    }

    /// Whether there is such a thing for certain in `pruned` propagation only: where layers are independent, hidden states move if
    /// another worker is quick enough to get a layer at all.
    pub(super) fn needs_chain(self) -> bool {
        use Transfer::{HiddenStatesReceived, HiddenStatesSent, StoredBoundary};
        matches!(self, Self::During(StoredBoundary | HiddenStatesSent | HiddenStatesReceived))
    }

    /// Whether a worker that is lost here, on one machine, ends the run: it is not planned yet.
    pub(super) fn is_before_plan(self) -> bool {
        matches!(self, Self::Behind(Kind::Created))
    }
}
