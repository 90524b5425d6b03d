//! The batch script for Slurm, with stand-ins for `srun` and `scontrol`: what it does when its job ends well, cannot be done, or is
//! told that its time is up.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use espalier_common::clock::{Clock as _, SystemClock};
use harness::checkpoint::same_files;
use harness::process::{PATIENCE, Workplace, binary};
use harness::{golden, repository, tiny};

use crate::past::{commits, outstanding};

/// Runs what it is to run on each node: here.
const SRUN: &str = "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nSLURMD_NODENAME=here exec \"$@\"\n";
/// Knows one node, and writes down what else it is asked.
const SCONTROL: &str = "#!/bin/bash\nif [[ $1 == show ]]; then echo here; else echo \"$@\" >> scontrol.log; fi\n";

/// A folder with a job and the stand-ins, in which the script is run.
struct Allocation {
    workplace: Workplace,
}

impl Allocation {
    fn new(sequences: usize) -> Self {
        let workplace = Workplace::new();
        let folder = workplace.path();
        for (name, text) in [("srun", SRUN), ("scontrol", SCONTROL)] {
            fs::write(folder.join(name), text).expect("a folder of our own takes what we write, and programs start");
            fs::set_permissions(folder.join(name), Permissions::from_mode(0o755))
                .expect("a folder of our own takes what we write, and programs start");
        }
        let utf8 = |path: PathBuf| path.to_str().expect("the repository's path is UTF-8").to_owned();
        let job = format!(
            "[model]\nsource = \"{}\"\n[calibration]\nsource = \"{}\"\nsamples = {sequences}\nsequence_length = 128\n[output]\nuri = \"{}\"\n",
            utf8(tiny("llama-tiny")),
            utf8(golden().join("text/wikitext2-valid-head.txt")),
            utf8(folder.join("out")),
        );
        fs::write(folder.join("job.toml"), job).expect("a folder of our own takes what we write, and programs start");
        Self { workplace }
    }

    fn folder(&self) -> &Path {
        self.workplace.path()
    }

    fn start(&self, restarts: &str) -> Child {
        let programs = binary("espalier").parent().expect("it is in a folder").to_owned();
        let path = format!(
            "{}:{}",
            self.folder().display(),
            std::env::var("PATH").expect("a folder of our own takes what we write, and programs start")
        );
        // Ports come from the number of the job: one that no other test has.
        let number = (std::process::id() % 10_000).to_string();
        Command::new("bash")
            .arg(repository().join("deploy/slurm/espalier.sbatch"))
            .current_dir(self.folder())
            .env("PATH", path)
            .envs([("ESPALIER_JOB", "job.toml"), ("ESPALIER_RUN", "run"), ("SLURM_JOB_NUM_NODES", "1")])
            .envs([("SLURM_JOB_NODELIST", "here"), ("SLURM_CPUS_PER_TASK", "1"), ("SLURM_RESTART_COUNT", restarts)])
            .env("SLURM_JOB_ID", number)
            .env("ESPALIER_BIN", programs)
            .stdin(Stdio::null())
            .stdout(
                fs::File::create(self.folder().join("stdout"))
                    .expect("a folder of our own takes what we write, and programs start"),
            )
            .stderr(
                fs::File::create(self.folder().join("stderr"))
                    .expect("a folder of our own takes what we write, and programs start"),
            )
            .spawn()
            .expect("a folder of our own takes what we write, and programs start")
    }

    fn wait_until<T>(&self, what: &str, mut seen: impl FnMut() -> Option<T>) -> T {
        let clock = SystemClock::default();
        loop {
            if let Some(found) = seen() {
                return found;
            }
            let passed = Duration::from_millis(clock.now().0);
            assert!(passed < PATIENCE, "no {what} after {PATIENCE:?}\n{}", self.errors());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn finish(&self, mut script: Child) -> ExitStatus {
        self.wait_until("end", || {
            script.try_wait().expect("a folder of our own takes what we write, and programs start")
        })
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.folder().join("stderr")).unwrap_or_default()
    }

    fn requeued(&self) -> usize {
        fs::read_to_string(self.folder().join("scontrol.log")).unwrap_or_default().lines().count()
    }
}

fn terminate(script: &Child) {
    let sent = Command::new("sh")
        .args(["-c", &format!("kill -TERM {}", script.id())])
        .status()
        .expect("a folder of our own takes what we write, and programs start");
    assert!(sent.success());
}

#[test]
fn a_job_whose_time_is_up_is_put_back_and_goes_on_to_the_same_bytes() {
    let reference = Allocation::new(32);
    reference.workplace.run(["prune", "--job", "job.toml", "--run", "run"]).unwrap().success().unwrap();
    let allocation = Allocation::new(32);
    let run = allocation.folder().join("run");
    let script = allocation.start("0");
    allocation.wait_until("commit and lease", || (!commits(&run).is_empty()).then(|| outstanding(&run)).flatten());
    terminate(&script);
    let ended = allocation.finish(script);
    assert_eq!(ended.code(), Some(75), "{}", allocation.errors());
    assert_eq!(allocation.requeued(), 1);
    let before = commits(&run);

    let ended = allocation.finish(allocation.start("1"));
    assert_eq!(ended.code(), Some(0), "{}", allocation.errors());
    assert_eq!(allocation.requeued(), 1, "a job that is done is not put back");
    assert!(commits(&run).starts_with(&before), "commits were lost");
    same_files(&reference.folder().join("out"), &allocation.folder().join("out")).unwrap();
}

#[test]
fn a_job_that_cannot_be_done_is_not_put_back() {
    let allocation = Allocation::new(1_000_000);
    let ended = allocation.finish(allocation.start("0"));
    assert_eq!((ended.code(), allocation.requeued()), (Some(65), 0), "{}", allocation.errors());
}

#[test]
fn a_job_that_was_put_back_often_enough_is_given_up() {
    let allocation = Allocation::new(32);
    let script = allocation.start("20");
    let run = allocation.folder().join("run");
    allocation.wait_until("lease", || outstanding(&run));
    terminate(&script);
    let ended = allocation.finish(script);
    assert_eq!((ended.code(), allocation.requeued()), (Some(75), 0), "{}", allocation.errors());
}
