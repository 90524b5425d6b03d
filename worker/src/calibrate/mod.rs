//! Data on its way through layers, and what is measured of it.

pub mod cache;
pub mod capture;
mod device_sums;
pub mod evaluate;
pub mod gram;
mod host_sum;
pub mod room;
pub mod squares;
pub mod tree;
