//! `coordinator.toml`: where a coordinator runs. What it computes is in the job.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use espalier_common::config::{self, ConfigError, Overrides};
use espalier_common::telemetry::LogConfig;
use espalier_gate::{Entrance, GateError, Role, TlsSection, Tokens};
use serde::{Deserialize, Serialize};

use crate::schedule::Limits;

/// Twice the interval of heartbeats.
const LEAST_SILENCE_SECONDS: u32 = 2;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorConfig {
    /// `[coordinator]`
    pub coordinator: CoordinatorSection,
    /// `[tls]`
    pub tls: TlsSection,
    /// `[auth]`
    pub auth: AuthSection,
    /// `[log]`
    pub log: LogConfig,
}

/// `[auth]`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthSection {
    /// A file of tokens that stand in for a certificate when a run is submitted or watched; see [`espalier_gate::tokens`].
    pub tokens: Option<PathBuf>,
}

/// What the command line is configured with when it calls a coordinator; there is no file, only environment and flags.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientConfig {
    /// `ESPALIER__CLIENT__…`
    pub client: ClientSection,
    /// `ESPALIER__TLS__…`
    pub tls: TlsSection,
}

/// `ESPALIER__CLIENT__…`
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientSection {
    /// A file with the token to show; never the token itself, which others could see among this process' arguments.
    pub token_file: Option<PathBuf>,
}

/// `[coordinator]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CoordinatorSection {
    /// Where workers and the command line reach it; beyond loopback only with `[tls]`.
    pub listen: SocketAddr,
    /// Where runs keep their journals and artifacts: a folder, or a URL of an object store.
    pub runs: String,
    /// Workers to wait for before a run is planned.
    pub workers: usize,
    /// In `pruned` propagation, the hidden states behind every so many layers, and those that go to another worker, are also
    /// stored, so that a run which loses all its workers need not begin at the tokens again; 0: never.
    pub stored_every: u32,
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
            stored_every: 0,
            worker_silence_seconds: 15,
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
        let config: Self = config::load(file, config::ENV_PREFIX, overrides)?;
        let seconds = config.coordinator.worker_silence_seconds;
        if seconds < LEAST_SILENCE_SECONDS {
            let reason = format!(
                "coordinator.worker_silence_seconds is {seconds}, but must be {LEAST_SILENCE_SECONDS} at least"
            );
            return Err(ConfigError::Invalid { origin: "configuration".to_owned(), reason });
        }
        Ok(config)
    }

    /// The patience that the scheduler is to have.
    pub fn limits(&self) -> Limits {
        Limits {
            worker_silence: Duration::from_secs(self.coordinator.worker_silence_seconds.into()),
            stored_every: self.coordinator.stored_every,
            ..Limits::default()
        }
    }

    /// Who is let in: the files of `[tls]` and `[auth]`, read.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn entrance(&self) -> Result<Entrance, GateError> {
        let credentials = self.tls.open(Some(Role::Coordinator))?;
        let tokens = self.auth.tokens.clone();
        if tokens.is_some() && credentials.is_none() {
            return Err(GateError::TokenWithoutTls { key: "auth.tokens" });
        }
        Ok(Entrance { credentials, tokens: tokens.map(Tokens::open).transpose()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silence_shorter_than_heartbeats_is_refused() {
        let load = |seconds: u32| {
            CoordinatorConfig::load(None, Overrides::default().set("coordinator.worker_silence_seconds", Some(seconds)))
        };
        assert_eq!(load(2).unwrap().limits().worker_silence, Duration::from_secs(2));
        assert!(load(1).unwrap_err().to_string().contains("worker_silence_seconds is 1"));
    }
}
