//! Espalier's worker.

pub mod calibrate;
pub mod config;
pub mod device;
pub mod holdings;
pub mod model;
pub mod prune;
pub mod transport;
