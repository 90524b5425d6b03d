//! What joins two workers: bodies go both ways, each whole, in the order in which they were sent.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use espalier_common::fault::FaultClass;
use espalier_common::report::LinkKind;

use super::parcel::ParcelError;

/// One end of what joins two workers.
///
/// Each end may send and receive at the same time, one body each. The receiver knows how long the next body is; an empty one
/// is there without anything being sent. After an error an end is of no more use: every call errs, none waits; and the other end
/// errs once this one is dropped.
#[async_trait]
pub trait Link: Send + Sync {
    /// What it is.
    fn kind(&self) -> LinkKind;

    /// Sends a body; returns once it needs no more of this side's memory.
    ///
    /// # Errors
    /// See [`BodyError`].
    async fn send(&self, body: Bytes) -> Result<(), BodyError>;

    /// Receives the next body, which must have so many bytes.
    ///
    /// # Errors
    /// See [`BodyError`].
    async fn receive(&self, bytes: usize) -> Result<Vec<u8>, BodyError>;

    /// Ends it: whoever waits at this end errs at once.
    fn abort(&self, reason: &str);
}

/// Why a body did not go over.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BodyError {
    /// The other side is gone.
    #[error("the other side has hung up")]
    HungUp,
    /// Nothing of a body came for too long.
    #[error("nothing came for {seconds} s")]
    Silent {
        /// How long.
        seconds: u64,
    },
    /// It had begun on both sides, and did not end.
    #[error("{what} of {bytes} bytes was not done after {seconds:.1} s")]
    Overdue {
        /// What was under way.
        what: &'static str,
        /// The body's.
        bytes: usize,
        /// What it was given.
        seconds: f64,
    },
    /// This side ended the link.
    #[error("given up: {reason}")]
    Aborted {
        /// Why.
        reason: String,
    },
    /// Another size than must come.
    #[error("{found} bytes are announced where {expected} must come")]
    Size {
        /// As announced.
        found: u64,
        /// As it must be.
        expected: u64,
    },
    /// Damaged on the way, or something else than was announced.
    #[error("checksum of a body of {bytes} bytes does not match")]
    Checksum {
        /// Its size.
        bytes: usize,
    },
    /// The other side does what it may not do now.
    #[error("{what} came out of turn")]
    OutOfTurn {
        /// What it did.
        what: &'static str,
    },
    /// Not the one that this side was to meet.
    #[error("rank {expected} of 2 was to be met, not {found}")]
    Stranger {
        /// Who is there.
        found: String,
        /// The rank that should be.
        expected: u32,
    },
    /// See the pieces.
    #[error(transparent)]
    Parcel(#[from] ParcelError),
    /// The library errs.
    #[error("{doing}: {said}")]
    Library {
        /// What it was asked for.
        doing: &'static str,
        /// What it says.
        said: String,
    },
}

impl BodyError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::HungUp
            | Self::Size { .. }
            | Self::Checksum { .. }
            | Self::OutOfTurn { .. }
            | Self::Stranger { .. }
            | Self::Parcel(_) => FaultClass::RetryHere,
            Self::Silent { .. } | Self::Overdue { .. } | Self::Aborted { .. } | Self::Library { .. } => {
                FaultClass::RetryElsewhere
            }
        }
    }
}

/// What a transfer may take once both sides have begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Patience {
    /// Whatever its size; also what two workers may take to meet.
    pub least: Duration,
    /// And this much for its bytes.
    pub bytes_per_second: f64,
}

impl Default for Patience {
    /// A tenth of what 10 Gbit/s carry: whoever is slower has no use for such a link.
    fn default() -> Self {
        Self { least: Duration::from_secs(30), bytes_per_second: 125e6 }
    }
}

impl Patience {
    /// Seconds for a body.
    pub fn seconds(&self, bytes: usize) -> f64 {
        self.least.as_secs_f64() + bytes as f64 / self.bytes_per_second
    }
}
