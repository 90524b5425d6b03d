//! Words that the coordinator and the workers both speak. No tensors, no sockets.
//!
//! In reading order: [`ids`] name things, [`job`] says what is to be computed, [`pattern`] what a sparse matrix must look
//! like, [`outline`] what a model is made of, [`fault`] why something failed; [`checkpoint`] and [`store`] read and write
//! the bytes.

pub mod build;
pub mod calibration;
pub mod checkpoint;
pub mod clock;
pub mod config;
pub mod device;
pub mod digest;
pub mod fault;
pub mod ids;
pub mod job;
pub mod memory;
pub mod metric;
pub mod outline;
pub mod pattern;
pub mod report;
pub mod shares;
pub mod store;
pub mod structure;
pub mod tasks;
pub mod telemetry;
pub mod wire;
