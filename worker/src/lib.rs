//! Espalier's worker.

pub mod calibrate;
pub mod linalg;
pub mod model;
pub mod prune;
