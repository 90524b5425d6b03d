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
    #[error(
        "`{url}` is no store: give a directory, or a file://, s3://, gs:// or az:// URL without user, query or fragment"
    )]
    UnknownScheme {
        /// The URL, without what it should not hold.
        url: String,
    },
    /// The environment does not say how to reach the store.
    #[error("{url} cannot be opened: {reason}")]
    Misconfigured {
        /// The store.
        url: String,
        /// What is missing or wrong; free of secrets.
        reason: String,
    },
    /// The blob is larger than anything that is read whole.
    #[error("{name} in {url} has {size} bytes, and at most {limit} are read")]
    TooLarge {
        /// The store.
        url: String,
        /// The blob, or what else there is too much of.
        name: String,
        /// Its size.
        size: u64,
        /// The bound.
        limit: u64,
    },
    /// The store did not answer, or not well, however often it was asked.
    #[error("{name} in {url}: {reason}")]
    Unavailable {
        /// The store.
        url: String,
        /// The blob.
        name: String,
        /// What it said last; free of secrets.
        reason: String,
        /// Whether it may be this machine that cannot reach it, rather than the store that is ill.
        unreachable: bool,
    },
    /// The store knows us and does not let us, or does not know us.
    #[error("access to {name} in {url} is denied: {reason}")]
    Denied {
        /// The store.
        url: String,
        /// The blob.
        name: String,
        /// What it said; free of secrets.
        reason: String,
    },
    /// The store says no: no such bucket, a malformed request.
    #[error("{name} in {url} is refused: {reason}")]
    Refused {
        /// The store.
        url: String,
        /// The blob.
        name: String,
        /// What it said; free of secrets.
        reason: String,
    },
    /// The store cannot do what is needed of it.
    #[error("{url} cannot put a blob only if it is absent, which a run needs there: {reason}")]
    Unsupported {
        /// The store.
        url: String,
        /// What it said.
        reason: String,
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
            Self::UnknownScheme { .. }
            | Self::Misconfigured { .. }
            | Self::TooLarge { .. }
            | Self::Denied { .. }
            | Self::Refused { .. }
            | Self::Unsupported { .. } => FaultClass::Reject,
            Self::NotFound { .. } | Self::Unavailable { unreachable: true, .. } => FaultClass::RetryElsewhere,
            Self::Io { .. } | Self::Unavailable { unreachable: false, .. } => FaultClass::RetryHere,
        }
    }
}
