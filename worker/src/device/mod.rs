//! What computes: the thread that owns the device, and what the machine can do.

pub mod memory;
pub mod thread;

pub use thread::{DeviceError, DeviceThread};
