//! What can go wrong with a store.

use crate::fault::FaultClass;

/// Why a store refused or failed; always with the blob's name.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not a relative path made of plain components.
    #[error("`{name}` is not a plain relative name")]
    BadName {
        /// The name.
        name: String,
    },
    /// No such blob.
    #[error("{url} has no {name}")]
    NotFound {
        /// The store.
        url: String,
        /// The blob.
        name: String,
    },
    /// The blob is shorter than the range asked for.
    #[error("{name} in {url} has {size} bytes, but bytes {start}..{end} were asked for")]
    RangeOutOfBounds {
        /// The store.
        url: String,
        /// The blob.
        name: String,
        /// Its size.
        size: u64,
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
    },
    /// The URL names no kind of store.
    #[error("`{url}` is no store: give a directory or a file:// URL")]
    UnknownScheme {
        /// The URL.
        url: String,
    },
    /// The file system failed.
    #[error("{name} in {url}")]
    Io {
        /// The store.
        url: String,
        /// The blob.
        name: String,
        /// What it said.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::BadName { .. } | Self::RangeOutOfBounds { .. } => FaultClass::Bug,
            Self::UnknownScheme { .. } => FaultClass::Reject,
            Self::NotFound { .. } => FaultClass::RetryElsewhere,
            Self::Io { .. } => FaultClass::RetryHere,
        }
    }
}
