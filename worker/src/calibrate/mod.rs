//! Running calibration data through layers and gathering statistics of their inputs.

pub mod cache;
pub mod capture;
pub mod gram;
