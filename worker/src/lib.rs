//! Espalier's worker.
//!
//! In reading order: [`serve`] is a worker's life, [`server`] what the coordinator calls, [`session`] what was asked for and
//! under which lease, [`layer_task`] how a layer is pruned, and [`crew`] how several workers share one; [`source`] and [`calibrate`] bring the inputs, [`model`] the
//! layers, [`prune`] the methods; [`transport`] moves hidden states between workers;
//! [`http`] and [`metrics`] tell of it.

pub mod ahead;
pub mod apply;
pub mod artifact;
pub mod boundary;
pub mod calibrate;
pub mod cli;
pub mod config;
pub mod crew;
pub mod cut_task;
pub mod device;
pub mod evaluation;
pub mod fleet;
pub mod holdings;
pub mod http;
pub mod keeping;
pub mod layer_task;
pub mod linalg;
pub mod mask;
pub mod metrics;
pub mod model;
pub mod prune;
pub mod reconstruct;
pub mod run;
pub mod serve;
pub mod server;
pub mod session;
#[cfg(test)]
mod session_tests;
pub mod source;
pub mod survey_task;
pub mod transport;
pub mod trial_task;
pub mod unit;
