//! What can go wrong with a journal.

use std::path::PathBuf;

use espalier_common::fault::FaultClass;
use espalier_common::store::StoreError;

/// Why a journal cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system failed.
    #[error("journal {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
    /// The object store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A record in the middle is damaged: what follows it cannot be trusted.
    #[error("journal {journal}: record {index} is damaged, and others follow it")]
    Damaged {
        /// The file or folder.
        journal: String,
        /// Index of the record.
        index: usize,
    },
    /// A record in the middle is not there.
    #[error("journal {journal}: record {index} is missing, and others follow it")]
    Missing {
        /// The folder.
        journal: String,
        /// Number of the record.
        index: usize,
    },
    /// A whole record that this version cannot read.
    #[error("journal {journal}: record {index} was written by another version: {source}")]
    Foreign {
        /// The file or folder.
        journal: String,
        /// Index of the record.
        index: usize,
        /// What the parser said.
        #[source]
        source: serde_json::Error,
    },
    /// Another process has the journal open.
    #[error("journal {} is in use by another coordinator: {holder}", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
        /// The process that holds it, as far as the system tells.
        holder: String,
    },
    /// Somebody else writes this journal now; what is in it is theirs to go on with.
    #[error("another coordinator has taken over {journal}: record {index} is of {by}")]
    Fenced {
        /// The folder.
        journal: String,
        /// Number of the record that was to be ours.
        index: usize,
        /// Who wrote it.
        by: String,
    },
    /// A record may or may not be there: nothing can be written behind it.
    #[error(
        "journal {journal}: it is not known whether record {index} was written; whoever takes it up again will see"
    )]
    Unsettled {
        /// The file or folder.
        journal: String,
        /// Number of the record.
        index: usize,
    },
}

impl JournalError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Damaged { .. } | Self::Missing { .. } | Self::Foreign { .. } => FaultClass::Reject,
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => FaultClass::Reject,
            Self::Store(error) => error.class(),
            Self::Io { .. } | Self::Busy { .. } | Self::Fenced { .. } | Self::Unsettled { .. } => FaultClass::RetryHere,
        }
    }
}
