//! The real binaries, each run in a folder of its own and ended by its process id when the test is over.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use espalier_common::clock::{Clock, SystemClock};
use serde_json::Value;
use tempfile::TempDir;

/// How long a command may take unless a test says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// How often a process is looked at while a test waits for it: there is no event to await from outside.
const POLL: Duration = Duration::from_millis(10);

/// The folder that cargo builds into, found from the running test's own path.
pub fn target_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    // TARGET/release/deps/suite-<hash>
    test.ancestors().nth(3).expect("cargo puts tests three folders deep").to_path_buf()
}

/// The path of `espalier` or `espalier-worker`, built beside the running test.
///
/// # Panics
/// If it has not been built.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let folder = test.ancestors().nth(2).expect("cargo puts tests two folders below the profile's");
    let path = folder.join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build --release --bins` first (`make test` does)",
        path.display()
    );
    path
}

/// A folder of its own for one test, in which commands are run. Whatever was started in it ends with it.
#[derive(Debug)]
pub struct Workplace {
    folder: TempDir,
    settings: Vec<(&'static str, String)>,
}

impl Workplace {
    /// Makes an empty folder.
    ///
    /// # Panics
    /// If the file system does not let it.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("the system's folder for temporary files is writable");
        Self { folder, settings: Vec::new() }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Sets an environment variable for everything that is started from now on.
    pub fn set(&mut self, variable: &'static str, value: &str) {
        self.settings.push((variable, value.to_owned()));
    }

    /// Starts `espalier` with `arguments` in the folder.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Running> {
        self.start_program("espalier", arguments)
    }

    /// Starts `espalier` or `espalier-worker` with `arguments` in the folder.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_program<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Result<Running> {
        self.start_with(program, arguments, &[])
    }

    /// Starts a program as [`Self::start_program`] does, with more environment variables.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_with<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
        variables: &[(&'static str, String)],
    ) -> Result<Running> {
        self.start_on(&[], program, arguments, variables)
    }

    /// Starts a program as [`Self::start_with`] does, by a command that becomes it; see [`crate::network::Network::on`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start_on<A: AsRef<OsStr>>(
        &self,
        by: &[String],
        program: &str,
        arguments: impl IntoIterator<Item = A>,
        variables: &[(&'static str, String)],
    ) -> Result<Running> {
        // Into files, not pipes: a full pipe would stop the process, and a worker that outlives it would keep one open.
        let output = tempfile::tempdir()?;
        let path = binary(program);
        let mut words = by.iter().map(OsStr::new).chain([path.as_os_str()]);
        let mut command = Command::new(words.next().expect("the program is one of them"));
        command.args(words).args(arguments).current_dir(self.path()).env("HF_HUB_OFFLINE", "1").stdin(Stdio::null());
        for (variable, _) in std::env::vars().filter(|(name, _)| name.starts_with("ESPALIER__")) {
            command.env_remove(variable);
        }
        command.envs(self.settings.iter().chain(variables).map(|(variable, value)| (variable, value)));
        let child = command
            .stdout(File::create(output.path().join("stdout"))?)
            .stderr(File::create(output.path().join("stderr"))?)
            .spawn()
            .with_context(|| format!("{program} cannot be started"))?;
        Ok(Running { child, output })
    }

    /// Runs `espalier` with `arguments` in the folder, to its end.
    ///
    /// # Errors
    /// If it cannot be started or takes longer than [`PATIENCE`].
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Result<Finished> {
        self.start(arguments)?.finish(PATIENCE)
    }
}

impl Default for Workplace {
    fn default() -> Self {
        Self::new()
    }
}

/// A command that was started. Dropping it kills it and its children.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: TempDir,
}

impl Running {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Process ids of its children that live now.
    ///
    /// # Errors
    /// If the process table cannot be read.
    pub fn children(&self) -> Result<Vec<u32>> {
        children(self.child.id())
    }

    /// Waits until it has at least `count` children.
    ///
    /// # Errors
    /// If it ends before it has, or takes longer than [`PATIENCE`].
    pub fn wait_for_children(&mut self, count: usize) -> Result<Vec<u32>> {
        let clock = SystemClock::default();
        loop {
            let children = self.children()?;
            if children.len() >= count {
                return Ok(children);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("espalier ended ({status}) before it had {count} workers\n{}", self.read("stderr"));
            }
            ensure!(!has_passed(&clock, PATIENCE), "espalier had no {count} workers after {PATIENCE:?}");
            thread::sleep(POLL);
        }
    }

    /// Kills it and nothing else, as a lost machine would, and waits until it is gone.
    ///
    /// # Errors
    /// If it has ended before.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("it ended ({status}) before it could be killed\n{}", self.read("stderr"));
        }
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until `seen` finds something, while it runs.
    ///
    /// # Errors
    /// If it ends first, or takes longer than [`PATIENCE`].
    pub fn wait_until<T>(&mut self, what: &str, mut seen: impl FnMut() -> Option<T>) -> Result<T> {
        let clock = SystemClock::default();
        loop {
            if let Some(found) = seen() {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("ended ({status}) before {what}\n{}", self.read("stderr"));
            }
            ensure!(!has_passed(&clock, PATIENCE), "no {what} after {PATIENCE:?}\n{}", self.read("stderr"));
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for a line of standard output that starts with `prefix`, and returns the rest of it.
    ///
    /// # Errors
    /// As [`Self::wait_until`].
    pub fn wait_for_line(&mut self, prefix: &str) -> Result<String> {
        let path = self.output.path().join("stdout");
        self.wait_until(prefix, || {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let (line, _) = text.split_once(prefix)?.1.split_once('\n')?;
            Some(line.to_owned())
        })
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// What it complained of so far.
    pub fn errors(&self) -> String {
        self.read("stderr")
    }

    /// Sends it SIGINT, as Ctrl-C does.
    ///
    /// # Errors
    /// If it cannot be sent.
    pub fn interrupt(&self) -> Result<()> {
        signal("INT", self.child.id())
    }

    /// Waits for its end, `patience` at most; then it is killed and that is an error.
    ///
    /// # Errors
    /// If it takes longer.
    pub fn finish(mut self, patience: Duration) -> Result<Finished> {
        let clock = SystemClock::default();
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            ensure!(!has_passed(&clock, patience), "espalier ran longer than {patience:?}\n{}", self.read("stderr"));
            thread::sleep(POLL);
        };
        Ok(Finished { status, stdout: self.read("stdout"), stderr: self.read("stderr") })
    }

    fn read(&self, stream: &str) -> String {
        let bytes = fs::read(self.output.path().join(stream)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let workers = self.children().unwrap_or_default();
            let _ = self.child.kill();
            let _ = self.child.wait();
            for worker in workers {
                let _ = signal("KILL", worker);
            }
        }
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How.
    pub status: ExitStatus,
    /// What it wrote.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

impl Finished {
    /// Its exit code, if it was not ended by a signal.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Checks that it ended well.
    ///
    /// # Errors
    /// With everything it wrote, if it did not.
    pub fn success(self) -> Result<Self> {
        ensure!(self.status.success(), "espalier failed: {}\n{}{}", self.status, self.stdout, self.stderr);
        Ok(self)
    }

    /// The one JSON document that `--json` writes.
    ///
    /// # Errors
    /// If standard output is anything else.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("not one JSON document: {}", self.stdout))
    }

    /// Lines of standard error that report an error.
    pub fn error_lines(&self) -> Vec<&str> {
        self.stderr.lines().filter(|line| line.starts_with("error:")).collect()
    }
}

/// Whether a process lives, one that has ended but was not waited for not counted.
pub fn is_alive(process: u32) -> bool {
    stat(process).is_some_and(|(state, _)| state != 'Z')
}

/// Whether a process stands still, stopped by a signal.
pub fn is_stopped(process: u32) -> bool {
    stat(process).is_some_and(|(state, _)| state == 'T')
}

/// Waits until none of `processes` lives.
///
/// # Errors
/// If one still does after `patience`.
pub fn wait_for_end(processes: &[u32], patience: Duration) -> Result<()> {
    let clock = SystemClock::default();
    while let Some(process) = processes.iter().find(|process| is_alive(**process)) {
        ensure!(!has_passed(&clock, patience), "process {process} is still there after {patience:?}");
        thread::sleep(POLL);
    }
    Ok(())
}

fn has_passed(clock: &SystemClock, patience: Duration) -> bool {
    Duration::from_millis(clock.now().0) > patience
}

/// Kills a process at once.
///
/// # Errors
/// If it is gone already.
pub fn kill(process: u32) -> Result<()> {
    signal("KILL", process)
}

/// Stops a process where it is until [`proceed`].
///
/// # Errors
/// If it is gone.
pub fn pause(process: u32) -> Result<()> {
    signal("STOP", process)
}

/// Lets a process that was stopped go on.
///
/// # Errors
/// If it is gone.
pub fn proceed(process: u32) -> Result<()> {
    signal("CONT", process)
}

/// The shell's own `kill`: std cannot send signals, and one call is no reason for a dependency.
fn signal(name: &str, process: u32) -> Result<()> {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {process}")]).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "process {process} cannot be sent SIG{name}");
    Ok(())
}

fn children(parent: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(process) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if stat(process).is_some_and(|(state, of)| of == parent && state != 'Z') {
            children.push(process);
        }
    }
    Ok(children)
}

/// State and parent of a process: the two fields behind the name in brackets, which may hold anything.
fn stat(process: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
