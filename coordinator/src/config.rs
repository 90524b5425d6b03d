//! `coordinator.toml`: where a coordinator runs. What it computes is in the job.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_common::config::{self, ConfigError, Overrides, Setting};
use espalier_common::telemetry::LogConfig;
use espalier_gate::trace::{Sending, Service};
use espalier_gate::{AuthSection, Entrance, GateError, HttpSection, Role, TlsSection, TraceSection, Tracer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::plan::strategy::Asked;
use crate::schedule::Limits;

/// Twice the interval of heartbeats.
const LEAST_SILENCE_SECONDS: u32 = 2;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// The coordinator itself.
    pub coordinator: CoordinatorSection,
    /// Its certificate, and whom it believes.
    pub tls: TlsSection,
    /// Who may come in without a certificate.
    pub auth: AuthSection,
    /// Pages and probes.
    pub http: HttpSection,
    /// Its logs.
    pub log: LogConfig,
    /// Where its spans go.
    pub trace: TraceSection,
}

/// What the command line is configured with when it calls a coordinator; there is no file, only environment and flags.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientConfig {
    /// `ESPALIER__CLIENT__…`
    pub client: ClientSection,
    /// `ESPALIER__TLS__…`
    pub tls: TlsSection,
}

/// `ESPALIER__CLIENT__…`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ClientSection {
    /// A file with the token to show; never the token itself, which others could see among this process' arguments.
    pub token_file: Option<PathBuf>,
}

/// The coordinator itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorSection {
    /// Where workers and the command line reach it; beyond loopback only with `[tls]`.
    pub listen: SocketAddr,
    /// Where runs keep their journals and artifacts: a folder, or a URL of an object store.
    pub runs: String,
    /// Workers to wait for before a run is planned.
    pub workers: usize,
    /// Seconds to wait for them before the run is stopped with exit code 75; a scheduler of a cluster may take long to place all.
    pub workers_patience_seconds: u32,
    /// In `pruned` propagation, the hidden states behind every so many layers, and those that go to another worker, are also
    /// stored, so that a run which loses all its workers need not begin at the tokens again; 0: never.
    pub stored_every: u32,
    /// How the workers share the calibration of a run: `layers`, where the owner of a layer lends shares of its input; `data`,
    /// where each worker keeps its share of the sequences from layer to layer and no hidden states travel; or `auto`, whichever
    /// is predicted to cost less. Not a byte of the result depends on it. A job that `data` cannot be used for (`dense`
    /// propagation, methods that remove heads and channels, a reconstruction) is refused. Without it: as the run was begun, and
    /// `layers` for a new one.
    pub strategy: Option<Asked>,
    /// A worker that says nothing for so many seconds is taken for lost, and its work is given to others; they say something
    /// every second, so 2 is the least.
    pub worker_silence_seconds: u32,
    /// The worker program that `prune` and `eval` start; empty: `espalier-worker` beside this program, or
    /// `espalier-worker-cuda` if that is there and can use a GPU.
    pub worker_program: PathBuf,
}

impl Default for CoordinatorSection {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 7433)),
            runs: "espalier-runs".to_owned(),
            workers: 1,
            workers_patience_seconds: 120,
            stored_every: 0,
            strategy: None,
            worker_silence_seconds: 15,
            worker_program: PathBuf::new(),
        }
    }
}

impl CoordinatorSection {
    /// How long a run waits for its workers.
    pub fn workers_patience(&self) -> Duration {
        Duration::from_secs(self.workers_patience_seconds.into())
    }
}

impl CoordinatorConfig {
    /// Loads it: defaults < file < environment < `overrides`.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        Self::explain(file, overrides).map(|(config, _)| config)
    }

    /// [`Self::load`], and where each key has its value from.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn explain(file: Option<&Path>, overrides: Overrides) -> Result<(Self, Vec<Setting>), ConfigError> {
        let (config, settings): (Self, _) = config::explain(file, config::ENV_PREFIX, overrides)?;
        let seconds = config.coordinator.worker_silence_seconds;
        if seconds < LEAST_SILENCE_SECONDS {
            let reason = format!(
                "coordinator.worker_silence_seconds is {seconds}, but must be {LEAST_SILENCE_SECONDS} at least"
            );
            return Err(ConfigError::Invalid { origin: "configuration".to_owned(), reason });
        }
        Ok((config, settings))
    }

    /// The patience that the scheduler is to have.
    pub fn limits(&self) -> Limits {
        Limits {
            worker_silence: Duration::from_secs(self.coordinator.worker_silence_seconds.into()),
            stored_every: self.coordinator.stored_every,
            ..Limits::default()
        }
    }

    /// What is told of runs, and what sends it to the collector, if one is named.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn tracer(&self) -> Result<(Tracer, Sending), GateError> {
        let collector = self.trace.collector(&self.tls)?;
        let service = Service { name: "espalier", version: env!("CARGO_PKG_VERSION"), instance: None };
        Ok(Tracer::start(collector, service))
    }

    /// Who is let in: the files of `[tls]` and `[auth]`, read.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn entrance(&self) -> Result<Entrance, GateError> {
        let credentials = self.tls.open(Some(Role::Coordinator))?;
        let tokens = self.auth.open(credentials.is_some())?;
        Ok(Entrance { credentials, tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strategy_is_one_of_three() {
        let load = |strategy: &str| {
            CoordinatorConfig::load(None, Overrides::default().set("coordinator.strategy", Some(strategy)))
        };
        assert_eq!(load("data").unwrap().coordinator.strategy, Some(Asked::Data));
        assert_eq!(CoordinatorConfig::default().coordinator.strategy, None);
        let refused = load("tensors").unwrap_err().to_string();
        assert!(refused.contains("tensors"), "{refused}");
    }

    #[test]
    fn a_silence_shorter_than_heartbeats_is_refused() {
        let load = |seconds: u32| {
            CoordinatorConfig::load(None, Overrides::default().set("coordinator.worker_silence_seconds", Some(seconds)))
        };
        assert_eq!(load(2).unwrap().limits().worker_silence, Duration::from_secs(2));
        assert!(load(1).unwrap_err().to_string().contains("worker_silence_seconds is 1"));
    }
}
