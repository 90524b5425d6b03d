//! Faults at exact places: a program is stopped right after a record of its journal is durable, or in the middle of a
//! transfer, or a call of it fails there; see `fault.c`, which is preloaded into it. Nothing in the product knows of this.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::compiled::compiled;
use crate::process::{Running, is_stopped, kill, proceed};

/// A place that a program comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Right behind the sync of a file whose last write held a text: the bytes are durable, and nothing followed yet.
    Synced {
        /// Part of the file's path.
        file: &'static str,
        /// Part of what was written.
        text: &'static str,
        /// How many such syncs there were.
        number: u32,
    },
    /// In the middle of a write: half of the bytes are in the file.
    Written {
        /// Part of the file's path.
        file: &'static str,
        /// Part of what is written; empty for anything.
        text: &'static str,
        /// How many such writes there were.
        number: u32,
    },
    /// Before a read of part of a file.
    Read {
        /// Part of the file's path.
        file: &'static str,
        /// How many such reads there were.
        number: u32,
    },
    /// Before more than so many bytes have left by one socket.
    Sent {
        /// How many.
        bytes: u32,
    },
    /// After so many bytes have come by one socket.
    Received {
        /// How many.
        bytes: u32,
    },
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// The whole program stands still until a test kills it or lets it go on.
    Stop,
    /// The call fails: no space, an error of the disk, or a connection that was reset.
    Fail,
}

/// One fault; the first process of that program that comes to the place has it, and no other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The program.
    pub program: &'static str,
    /// Where.
    pub place: Place,
    /// What.
    pub deed: Deed,
}

impl Fault {
    fn rule(&self) -> String {
        let (place, file, text, number) = match self.place {
            Place::Synced { file, text, number } => ("synced", file, text, number),
            Place::Written { file, text, number } => ("written", file, text, number),
            Place::Read { file, number } => ("read", file, "", number),
            Place::Sent { bytes } => ("sent", "", "", bytes),
            Place::Received { bytes } => ("received", "", "", bytes),
        };
        let deed = match self.deed {
            Deed::Stop => "stop",
            Deed::Fail => "fail",
        };
        [self.program, place, file, text, &number.to_string(), deed].join("\t")
    }
}

/// Faults that wait to happen.
#[derive(Debug)]
pub struct Faults {
    rules: Vec<Fault>,
    library: PathBuf,
    /// A file for each that happened, named by its place in the list, with the id of the process.
    marks: TempDir,
}

impl Faults {
    /// Prepares `rules`; compiles what is preloaded if this is the first time.
    ///
    /// # Errors
    /// If there is no C compiler, or the file system fails.
    pub fn new(rules: Vec<Fault>) -> Result<Self> {
        let library = compiled("fault", include_str!("fault.c"), &["-shared", "-fPIC", "-ldl", "-lpthread"])?;
        Ok(Self { rules, library, marks: tempfile::tempdir()? })
    }

    /// The environment variables that programs have to be started with.
    pub fn variables(&self) -> Vec<(&'static str, String)> {
        if self.rules.is_empty() {
            return Vec::new();
        }
        let rules: Vec<String> = self.rules.iter().map(Fault::rule).collect();
        vec![
            ("LD_PRELOAD", self.library.display().to_string()),
            ("FAULT_RULES", rules.join("\n")),
            ("FAULT_FOLDER", self.marks.path().display().to_string()),
        ]
    }

    /// The process that had fault `index`, if it happened; one that is to stop has stopped by then.
    pub fn happened(&self, index: usize) -> Option<u32> {
        let process =
            fs::read_to_string(self.marks.path().join(index.to_string())).ok()?.strip_suffix('\n')?.parse().ok()?;
        (self.rules[index].deed == Deed::Fail || is_stopped(process)).then_some(process)
    }

    /// Waits for fault `index` while `running` runs, and returns the process that stands still there.
    ///
    /// # Errors
    /// If `running` ends first, or it takes too long.
    pub fn wait_for(&self, index: usize, running: &mut Running) -> Result<Halted> {
        ensure!(self.rules[index].deed == Deed::Stop, "fault {index} stops nothing");
        let process = running.wait_until(&format!("{:?}", self.rules[index]), || self.happened(index))?;
        Ok(Halted { process })
    }
}

/// A process that stands still. It goes on when this is dropped, if it lives.
#[derive(Debug)]
pub struct Halted {
    /// Its id.
    pub process: u32,
}

impl Halted {
    /// Kills it where it stands.
    ///
    /// # Errors
    /// If it is gone.
    pub fn kill(self) -> Result<()> {
        kill(self.process)
    }

    /// Lets it go on.
    pub fn proceed(self) {}
}

impl Drop for Halted {
    fn drop(&mut self) {
        // It may have been killed, which was the point.
        let _ = proceed(self.process);
    }
}
