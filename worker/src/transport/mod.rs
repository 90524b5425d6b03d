//! Tensors from worker to worker, in bounded chunks, paid for with credits.
//!
//! Hidden states are pulled by their receiver: [`chunk`] is the format (cutting, checking, assembling), [`credit`] the sender's
//! purse. What a layer's owner and its assistants say to each other goes both ways: [`parcel`]. [`grpc`] carries all of it.

pub mod chunk;
pub mod credit;
pub mod grpc;
pub mod parcel;

pub use chunk::{ChunkError, Expected};
pub use grpc::{FetchError, LinkError, Received, Remote, fetch};
pub use parcel::{Letter, Outgoing};

/// Largest payload of one chunk: at 1 MiB, tonic reaches most of its speed and a message stays far below any limit.
pub const CHUNK_BYTES: usize = 1 << 20;

/// What a receiver grants ahead: a few chunks more than a fast link holds under way.
pub const WINDOW_BYTES: u64 = 16 << 20;
