//! Espalier's worker.

pub mod model;
pub mod prune;
