//! A real S3 server process, if one is installed: moto's, which `make test-s3` gets from PyPI.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use espalier_common::store::StoreSettings;
use tempfile::NamedTempFile;

use crate::process::{Workplace, target_folder};

/// The bucket that the server has.
pub const BUCKET: &str = "espalier-test";

/// Seconds that clients of a server in trouble wait for an answer.
const DEADLINE_SECONDS: u32 = 4;

/// A server of this test's own, on loopback; it ends with the test.
#[derive(Debug)]
pub struct S3Server {
    process: Child,
    host: String,
    port: u16,
    /// A line for each request that met with trouble, if there is to be any.
    troubles: Option<NamedTempFile>,
}

/// Trouble that requests meet with.
#[derive(Debug, Clone, Copy)]
pub struct Trouble {
    /// What draws which.
    pub seed: u64,
    /// How many of a thousand.
    pub of_thousand: u32,
}

/// The Python that the server runs in, which also has a client: boto3.
pub fn python() -> PathBuf {
    target_folder().join("s3/venv/bin/python")
}

impl S3Server {
    /// Starts a server; `None`, said aloud, if none is installed.
    ///
    /// # Errors
    /// If it is installed and does not start.
    pub fn start() -> Result<Option<Self>> {
        Self::start_on(&[], "127.0.0.1")
    }

    /// One that refuses some requests with 500 and 503, answers some late, some with 500 though it has done what they ask, and does
    /// some only after their client has given them up.
    ///
    /// # Errors
    /// If it is installed and does not start.
    pub fn start_troubled(trouble: Trouble) -> Result<Option<Self>> {
        Self::start_with(&[], "127.0.0.1", Some(trouble))
    }

    /// The same on an address of a machine, by a command that becomes it; see [`crate::network::Network::on`].
    ///
    /// # Errors
    /// If it is installed and does not start.
    pub fn start_on(by: &[String], host: &str) -> Result<Option<Self>> {
        Self::start_with(by, host, None)
    }

    #[allow(clippy::print_stderr, reason = "a test that is skipped must say so")]
    fn start_with(by: &[String], host: &str, trouble: Option<Trouble>) -> Result<Option<Self>> {
        if !python().is_file() {
            eprintln!("SKIPPED: no S3 server in {}: run `make test-s3`", python().display());
            return Ok(None);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("harness/s3_server.py");
        let python = python();
        let mut words = by.iter().map(OsStr::new).chain([python.as_os_str()]);
        let troubles = trouble.map(|_| NamedTempFile::new()).transpose()?;
        let mut command = Command::new(words.next().context("the program is one of them")?);
        command.args(words).arg(script).args([BUCKET, host]);
        if let Some((trouble, file)) = trouble.zip(troubles.as_ref()) {
            let numbers = [trouble.seed.to_string(), trouble.of_thousand.to_string(), DEADLINE_SECONDS.to_string()];
            command.args(numbers).arg(file.path());
        }
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("the S3 server cannot be started")?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("its standard output is a pipe")?).read_line(&mut line)?;
        let port = line.trim().parse().with_context(|| format!("the S3 server says `{line}` instead of its port"))?;
        Ok(Some(Self { process, host: host.to_owned(), port, troubles }))
    }

    /// How many requests met with each kind of trouble so far.
    ///
    /// # Errors
    /// If the file system fails.
    pub fn troubles(&self) -> Result<BTreeMap<String, u64>> {
        let mut counts = BTreeMap::new();
        if let Some(file) = &self.troubles {
            for line in std::fs::read_to_string(file.path())?.lines() {
                *counts.entry(line.to_owned()).or_default() += 1;
            }
        }
        Ok(counts)
    }

    /// The environment in which it is found.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        let deadline = self.troubles.is_some().then(|| ("AWS_TIMEOUT", format!("{DEADLINE_SECONDS}s")));
        let variables = [
            ("AWS_ENDPOINT_URL", format!("http://{}:{}", self.host, self.port)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", "test-key".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test-secret".to_owned()),
        ];
        variables.into_iter().chain(deadline).collect()
    }

    /// The same for stores opened in this process.
    pub fn settings(&self) -> StoreSettings {
        StoreSettings::from_variables(self.variables().into_iter().map(|(name, value)| (name.to_owned(), value)))
    }

    /// A folder whose commands find the server.
    pub fn workplace(&self) -> Workplace {
        let mut workplace = Workplace::new();
        for (variable, value) in self.variables() {
            workplace.set(variable, &value);
        }
        workplace
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
