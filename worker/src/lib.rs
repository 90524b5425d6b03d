//! Espalier's worker.

pub mod calibrate;
pub mod model;
pub mod prune;
