//! Hidden states from worker to worker: pulled by the receiver, in bounded chunks, paid for with credits.
//!
//! [`chunk`] is the format (cutting, checking, assembling), [`credit`] the sender's purse; [`grpc`] carries both.

pub mod chunk;
pub mod credit;
pub mod grpc;

pub use chunk::{ChunkError, Expected};
pub use grpc::{FetchError, LinkError, Remote, fetch};

/// Largest payload of one chunk: at 1 MiB, tonic reaches most of its speed and a message stays far below any limit.
pub const CHUNK_BYTES: usize = 1 << 20;

/// What a receiver grants ahead: a few chunks more than a fast link holds under way.
pub const WINDOW_BYTES: u64 = 16 << 20;
