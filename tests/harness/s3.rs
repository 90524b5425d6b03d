//! A real S3 server process, if one is installed: moto's, which `make test-s3` gets from PyPI.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use espalier_common::store::StoreSettings;

use crate::process::{Workplace, target_folder};

/// The bucket that the server has.
pub const BUCKET: &str = "espalier-test";

/// A server of this test's own, on loopback; it ends with the test.
#[derive(Debug)]
pub struct S3Server {
    process: Child,
    host: String,
    port: u16,
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

    /// The same on an address of a machine, by a command that becomes it; see [`crate::network::Network::on`].
    ///
    /// # Errors
    /// If it is installed and does not start.
    #[allow(clippy::print_stderr, reason = "a test that is skipped must say so")]
    pub fn start_on(by: &[String], host: &str) -> Result<Option<Self>> {
        if !python().is_file() {
            eprintln!("SKIPPED: no S3 server in {}: run `make test-s3`", python().display());
            return Ok(None);
        }
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("harness/s3_server.py");
        let python = python();
        let mut words = by.iter().map(OsStr::new).chain([python.as_os_str()]);
        let mut process = Command::new(words.next().context("the program is one of them")?)
            .args(words)
            .arg(script)
            .args([BUCKET, host])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("the S3 server cannot be started")?;
        let mut line = String::new();
        BufReader::new(process.stdout.take().context("its standard output is a pipe")?).read_line(&mut line)?;
        let port = line.trim().parse().with_context(|| format!("the S3 server says `{line}` instead of its port"))?;
        Ok(Some(Self { process, host: host.to_owned(), port }))
    }

    /// The environment in which it is found.
    pub fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", format!("http://{}:{}", self.host, self.port)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", "test-key".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test-secret".to_owned()),
        ]
    }

    /// The same for stores opened in this process.
    pub fn settings(&self) -> StoreSettings {
        StoreSettings::from_variables(self.variables().map(|(name, value)| (name.to_owned(), value)))
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
