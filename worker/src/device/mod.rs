//! What computes: the device that was chosen, the thread that owns it, its kernels, and what the machine can do.
//!
//! With the feature `cuda` a GPU can be chosen, and with `nccl` two of them joined. What the builds do differently is behind
//! `backend`, and nothing outside this folder knows which of them it is in.

#[cfg(not(feature = "cuda"))]
mod absent;
pub mod choice;
#[cfg(feature = "cuda")]
mod cuda;
mod heap;
mod joining;
pub mod kernels;
pub mod memory;
mod order;
pub mod thread;

#[cfg(not(feature = "cuda"))]
use absent as backend;
#[cfg(feature = "cuda")]
use cuda as backend;

pub use self::choice::{Chosen, devices, open};
pub use self::heap::keep_freed_memory;
pub use self::joining::carrier;
pub use self::order::in_order;
pub use self::thread::{DeviceError, DeviceThread};
