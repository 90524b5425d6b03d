//! `coordinator.toml`: where a coordinator runs. What it computes is in the job.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use espalier_common::config::{self, ConfigError, Overrides};
use espalier_common::telemetry::LogConfig;
use serde::{Deserialize, Serialize};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// `[coordinator]`
    pub coordinator: CoordinatorSection,
    /// `[log]`
    pub log: LogConfig,
}

/// `[coordinator]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorSection {
    /// Where workers and the command line reach it; loopback only.
    pub listen: SocketAddr,
    /// Where runs keep their journals and artifacts: a folder, or a URL of an object store.
    pub runs: String,
    /// Workers to wait for before a run is planned.
    pub workers: usize,
    /// In `pruned` propagation, the hidden states behind every so many layers, and those that go to another worker, are also
    /// stored, so that a run which loses all its workers need not begin at the tokens again; 0: never.
    pub stored_every: u32,
    /// The worker program that `prune` and `eval` start; empty: `espalier-worker` beside this program.
    pub worker_program: PathBuf,
}

impl Default for CoordinatorSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7433)),
            runs: "espalier-runs".to_owned(),
            workers: 1,
            stored_every: 0,
            worker_program: PathBuf::new(),
        }
    }
}

impl CoordinatorConfig {
    /// Loads it: defaults < file < environment < `overrides`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        config::load(file, config::ENV_PREFIX, overrides)
    }
}
