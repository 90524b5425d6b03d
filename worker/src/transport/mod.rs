//! Tensors from worker to worker.
//!
//! Hidden states are pulled by their receiver, in bounded chunks, paid for with credits: [`chunk`] is the format (cutting,
//! checking, assembling), [`credit`] the sender's purse. [`grpc`] serves and calls.
//!
//! What a layer's owner and its assistants say to each other goes both ways, in letters ([`parcel`], [`mod@line`]). Their bodies go
//! over a [`Link`]: in pieces on the stream of the call ([`stream`]); where both sides agree on it ([`negotiation`]), in memory of
//! their machine ([`ring`]) or from device to device ([`paired`]); or by hand in one process ([`loopback`]). What several workers do
//! together is made of links, one a pair, in a star ([`collective`]): so nobody's death is felt beyond its own link.

pub mod chunk;
pub mod collective;
pub mod communicator;
#[cfg(test)]
mod conformance;
pub mod credit;
#[cfg(test)]
pub(crate) mod fake;
pub mod grpc;
pub mod line;
pub mod link;
pub mod loopback;
pub mod negotiation;
pub mod paired;
pub mod parcel;
pub mod ring;
pub mod stream;
pub mod turns;

pub use chunk::{ChunkError, Expected};
pub use grpc::{FetchError, LinkError, Remote, fetch};
pub use line::{Line, Received};
pub use link::{BodyError, Link};
pub use negotiation::{Carrier, Joining};
pub use parcel::{Letter, Outgoing};
pub use ring::SharedMemory;

/// Largest payload of one chunk: at 1 MiB, tonic reaches most of its speed and a message stays far below any limit.
pub const CHUNK_BYTES: usize = 1 << 20;

/// What a receiver grants ahead: a few chunks more than a fast link holds under way.
pub const WINDOW_BYTES: u64 = 16 << 20;
