//! Planning: pure functions from what is known before the first layer is touched.

pub mod allocate;
pub mod partition;
