//! Why a run ended badly, and what exit code that is.

use std::path::{Path, PathBuf};

use espalier_common::checkpoint::CheckpointError;
use espalier_common::device::DeviceChoice;
use espalier_common::fault::{Fault, FaultClass};
use espalier_common::job::JobError;
use espalier_common::store::StoreError;
use espalier_gate::GateError;

use crate::calibration::CalibrationError;
use crate::driver::DriveError;
use crate::fleet::CallError;
use crate::journal::JournalError;
use crate::layout::LayoutError;
use crate::plan::strategy::StrategyError;
use crate::plan::widths::WidthError;
use crate::report::ReportError;
use crate::schedule::Failure;

/// The exit codes of every program of Espalier.
pub mod exit {
    /// Wrong usage.
    pub const USAGE: u8 = 2;
    /// The job or its input is wrong: do not retry.
    pub const REJECTED: u8 = 65;
    /// A bug in Espalier.
    pub const BUG: u8 = 70;
    /// Interrupted, or the cluster was lost: resume it.
    pub const INTERRUPTED: u8 = 75;
}

/// Why a run ended badly.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The job is wrong.
    #[error(transparent)]
    Job(#[from] JobError),
    /// The job cannot be written down.
    #[error("job cannot be written as TOML")]
    JobText(#[source] Box<toml::ser::Error>),
    /// The model or the output.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The output could not be written; what was pruned is not lost.
    #[error("the checkpoint was not written")]
    Write(#[source] CheckpointError),
    /// The run would be part of its own output.
    #[error("the run {} lies in the output {}: choose another --run", run.display(), output.display())]
    RunInOutput {
        /// The run's folder.
        run: PathBuf,
        /// The output.
        output: PathBuf,
    },
    /// The widths asked for.
    #[error(transparent)]
    Widths(#[from] WidthError),
    /// The layout asked for.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The strategy asked for.
    #[error(transparent)]
    Strategy(#[from] StrategyError),
    /// The texts.
    #[error(transparent)]
    Calibration(#[from] CalibrationError),
    /// The run's store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The run's journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The run's folder.
    #[error("run folder {}", path.display())]
    Folder {
        /// The folder or file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// The store holds another run.
    #[error("{run} holds a run of another job ({differences}): resume that one, or choose another --run")]
    Differs {
        /// The run's folder or URL.
        run: String,
        /// What differs.
        differences: String,
    },
    /// The journal does not begin with a run.
    #[error("the journal in {0} does not tell of the creation of a run")]
    Headless(String),
    /// A file of the run cannot be read as what it is.
    #[error("{name} in {run}: {reason}")]
    RunFile {
        /// The run's folder or URL.
        run: String,
        /// The file.
        name: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// The method changed since the run was planned.
    #[error("the run was planned with version {frozen} of method {method}, but the workers have version {found}")]
    MethodVersion {
        /// The method.
        method: String,
        /// As planned.
        frozen: String,
        /// As found.
        found: String,
    },
    /// The workers round otherwise than those that began the run.
    #[error(
        "the run was computed with {frozen} so far, but the workers compute with {found}: results could differ in the last \
         bit; start workers like the first"
    )]
    InstructionSet {
        /// What was computed with.
        frozen: String,
        /// What the workers have.
        found: String,
    },
    /// Workers did not come.
    #[error("waited {seconds} s for {wanted} workers")]
    TooFewWorkers {
        /// How many were wanted.
        wanted: usize,
        /// How long was waited.
        seconds: u64,
    },
    /// A worker was lost before the run was planned.
    #[error("a worker ended before the run was planned; its log says why")]
    WorkerDiedEarly,
    /// A worker says no.
    #[error(transparent)]
    Fault(Fault),
    /// A worker does not answer.
    #[error(transparent)]
    Call(CallError),
    /// A schedule was not brought to its end.
    #[error(transparent)]
    Drive(DriveError),
    /// An artifact is not what its digest says.
    #[error("artifact {name} is damaged: its digest is not {expected}")]
    Damaged {
        /// The artifact.
        name: String,
        /// The digest it should have.
        expected: String,
    },
    /// An artifact lacks a tensor or holds one of the wrong shape.
    #[error("artifact {name}: {reason}")]
    Artifact {
        /// The artifact.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The journal gives no report.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Somebody asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A program that the run needs cannot be started.
    #[error("worker program {}", path.display())]
    Launch {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The device asked for cannot be had here.
    #[error("--device {device}: {reason}")]
    Device {
        /// What was asked for.
        device: DeviceChoice,
        /// Why not.
        reason: String,
    },
    /// Who may come in.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The coordinator's own services cannot listen.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

impl From<DriveError> for RunError {
    fn from(error: DriveError) -> Self {
        match error {
            DriveError::Interrupted => Self::Interrupted,
            DriveError::Rejected(fault) => Self::Fault(fault),
            other => Self::Drive(other),
        }
    }
}

/// Whether a file system may take tomorrow what it does not take today: a full disk does, a path that is wrong does not.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    !matches!(
        error.kind(),
        ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::AlreadyExists
            | ErrorKind::NotADirectory
            | ErrorKind::IsADirectory
            | ErrorKind::DirectoryNotEmpty
            | ErrorKind::InvalidInput
            | ErrorKind::InvalidFilename
            | ErrorKind::InvalidData
            | ErrorKind::UnexpectedEof
    )
}

impl RunError {
    pub(crate) fn folder(path: &Path, source: std::io::Error) -> Self {
        Self::Folder { path: path.to_owned(), source }
    }

    pub(crate) fn job_text(error: toml::ser::Error) -> Self {
        Self::JobText(Box::new(error))
    }

    /// The exit code this amounts to.
    pub fn exit_code(&self) -> u8 {
        let of_class = |class: FaultClass| match class {
            FaultClass::Reject => exit::REJECTED,
            FaultClass::Bug => exit::BUG,
            FaultClass::RetryHere | FaultClass::RetryElsewhere => exit::INTERRUPTED,
        };
        match self {
            Self::Job(_)
            | Self::Widths(_)
            | Self::Layout(_)
            | Self::Strategy(_)
            | Self::JobText(_)
            | Self::Calibration(_)
            | Self::RunInOutput { .. }
            | Self::Differs { .. }
            | Self::Headless(_)
            | Self::RunFile { .. }
            | Self::MethodVersion { .. }
            | Self::Gate(_)
            | Self::Listen { .. }
            | Self::Device { .. }
            | Self::Launch { .. } => exit::REJECTED,
            Self::Checkpoint(CheckpointError::Io { source, .. }) | Self::Folder { source, .. }
                if is_passing(source) =>
            {
                exit::INTERRUPTED
            }
            Self::Store(error) | Self::Checkpoint(CheckpointError::Store(error)) => of_class(error.class()),
            Self::Checkpoint(_) | Self::Folder { .. } => exit::REJECTED,
            Self::Journal(error) | Self::Drive(DriveError::Journal(error)) => of_class(error.class()),
            Self::Write(_)
            | Self::TooFewWorkers { .. }
            | Self::InstructionSet { .. }
            | Self::WorkerDiedEarly
            | Self::Call(_)
            | Self::Interrupted => exit::INTERRUPTED,
            Self::Fault(fault) => of_class(fault.class),
            Self::Drive(DriveError::Failed(Failure::Unit { fault, .. })) => of_class(fault.class),
            Self::Drive(_) => exit::INTERRUPTED,
            Self::Damaged { .. } | Self::Artifact { .. } | Self::Report(_) => exit::BUG,
        }
    }

    /// The error and all its causes, in one line.
    pub fn one_line(&self) -> String {
        Fault::new(FaultClass::Reject, self).message
    }
}
