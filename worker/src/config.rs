//! `worker.toml`: where a worker runs. What it computes is in the job.

use std::net::SocketAddr;
use std::path::PathBuf;

use espalier_common::telemetry::LogConfig;
use serde::{Deserialize, Serialize};

/// The worker's configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// The worker itself.
    pub worker: WorkerSection,
    /// Its logs.
    pub log: LogConfig,
}

/// `[worker]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSection {
    /// URL of the coordinator, e.g. `http://127.0.0.1:7070`.
    pub coordinator: Option<String>,
    /// Where the worker's own services listen; port 0 takes a free one.
    pub listen: SocketAddr,
    /// A name for people; host and process if none is given.
    pub name: Option<String>,
    /// Compute threads; as many as the process may use if none is given.
    pub threads: Option<usize>,
    /// Bytes of hidden states kept in memory, the rest goes to `scratch`; a quarter of the machine's memory if none is given.
    pub memory_budget: Option<u64>,
    /// Speed of f32 matrix products in GFLOP/s that the worker offers, by which layers are shared out; measured at the start if
    /// none is given, which a busy machine makes less of than it is.
    pub gflops: Option<f64>,
    /// Folder for what does not fit; the system's temporary folder if none is given.
    pub scratch: Option<PathBuf>,
}

impl Default for WorkerSection {
    fn default() -> Self {
        Self {
            coordinator: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            name: None,
            threads: None,
            memory_budget: None,
            gflops: None,
            scratch: None,
        }
    }
}
