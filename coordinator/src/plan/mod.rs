//! How a model is cut among workers, and what a run would cost before any of it is spent. Pure: from outlines and offers.

pub mod allocate;
pub mod cluster;
pub mod cost;
pub mod measured;
pub mod memory;
pub mod owl;
pub mod partition;
pub mod predict;
pub mod strategy;
pub mod widths;

/// A worker's measured speed as the scheduler compares it; 0 if it makes no sense.
pub fn megaflops(gflops: f64) -> u64 {
    // A cast of what is negative or no number gives 0.
    (gflops * 1e3) as u64
}
