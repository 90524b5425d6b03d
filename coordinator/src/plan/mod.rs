//! How a model is cut among workers, and what a run would cost before any of it is spent. Pure: from outlines and offers.

pub mod cluster;
pub mod cost;
pub mod partition;
pub mod predict;
pub mod widths;
