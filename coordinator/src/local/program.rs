//! Which worker program is started, and what each worker computes on.
//!
//! There are two builds of the worker: one for the CPU, which starts anywhere, and one for CUDA, which the system's loader
//! stops where there is no driver. So this process asks the second one what it can use, and never has to know.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use espalier_common::device::{DeviceChoice, Devices};
use tokio::process::Command;

use crate::error::RunError;

/// The build for the CPU.
const CPU_BUILD: &str = "espalier-worker";
/// The build for CUDA.
const CUDA_BUILD: &str = "espalier-worker-cuda";
/// What a driver may take to wake its GPUs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Picked {
    /// The program.
    pub(super) program: PathBuf,
    /// What workers compute on, in turns.
    pub(super) devices: Vec<DeviceChoice>,
    /// Why.
    pub(super) reason: String,
    /// Whether there were two builds to choose from, and nobody had chosen.
    pub(super) was_chosen: bool,
}

impl Picked {
    /// What people are told of a choice between the two builds; nothing where there is but one, or the choice was theirs.
    pub(super) fn told(&self) -> Option<String> {
        let devices = self.devices.iter().map(DeviceChoice::to_string).collect::<Vec<_>>().join(", ");
        self.was_chosen.then(|| format!("computing on {devices}: {}", self.reason))
    }

    /// What worker `index` computes on.
    pub(super) fn device(&self, index: usize) -> DeviceChoice {
        self.devices[index % self.devices.len()]
    }
}

/// Picks the program in `folder`, or the one that is `configured`, which is started as it is. Without a folder, or where the
/// build for the CPU is not in it, that one is looked for on the PATH.
///
/// # Errors
/// `Device` if a GPU was asked for that cannot be had.
pub(super) async fn pick(choice: DeviceChoice, configured: &Path, folder: Option<&Path>) -> Result<Picked, RunError> {
    if !configured.as_os_str().is_empty() {
        let reason = "this worker program was configured".to_owned();
        return Ok(Picked { program: configured.to_owned(), devices: vec![choice], reason, was_chosen: false });
    }
    let beside = |name: &str| folder.map(|folder| folder.join(name)).filter(|path| path.exists());
    let cuda = beside(CUDA_BUILD);
    let was_chosen = choice == DeviceChoice::Auto && cuda.is_some();
    let cpu = |reason: String| {
        let program = beside(CPU_BUILD).unwrap_or_else(|| PathBuf::from(CPU_BUILD));
        Picked { program, devices: vec![DeviceChoice::Cpu], reason, was_chosen }
    };
    let found = match (choice, &cuda) {
        (DeviceChoice::Cpu, _) => return Ok(cpu("the CPU was asked for".to_owned())),
        (_, Some(program)) => gpus(program).await,
        (_, None) => Err(format!("there is no {CUDA_BUILD} beside this program")),
    };
    match (choice, found.map(|gpus| (gpus, cuda.unwrap_or_default()))) {
        (DeviceChoice::Cuda(number), Ok((gpus, _))) if number >= gpus => {
            let reason = format!("this machine has {gpus}, which are counted from 0");
            Err(RunError::Device { device: choice, reason })
        }
        (DeviceChoice::Cuda(_), Ok((_, program))) => {
            Ok(Picked { program, devices: vec![choice], reason: "this GPU was asked for".to_owned(), was_chosen })
        }
        (DeviceChoice::Cuda(_), Err(reason)) => Err(RunError::Device { device: choice, reason }),
        (_, Ok((gpus, program))) => {
            let devices = (0..gpus).map(DeviceChoice::Cuda).collect();
            Ok(Picked { program, devices, reason: format!("{CUDA_BUILD} can use {gpus} GPUs"), was_chosen })
        }
        (_, Err(reason)) => Ok(cpu(reason)),
    }
}

/// How many GPUs a build of the worker can use, or why none.
async fn gpus(program: &Path) -> Result<usize, String> {
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let asked = Command::new(program).args(["devices", "--json"]).stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(output)) => output,
        Ok(Err(error)) => return Err(format!("{name} cannot be started: {error}")),
        Err(_) => return Err(format!("{name} did not say what it can use within {} s", PATIENCE.as_secs())),
    };
    if !output.status.success() {
        // The loader's complaint, where there is no driver.
        let complaint = String::from_utf8_lossy(&output.stderr);
        let complaint = complaint.lines().next().unwrap_or_default();
        return Err(format!("{name} does not start here ({}): {complaint}", output.status));
    }
    let devices: Devices = serde_json::from_slice(&output.stdout)
        .map_err(|error| format!("{name} said something else than what it can use: {error}"))?;
    match devices.gpus.len() {
        0 => Err(devices.absent.unwrap_or_else(|| format!("{name} found no GPU"))),
        gpus => Ok(gpus),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A folder with both builds, the one for CUDA being a script.
    fn installed(script: Option<&str>) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CPU_BUILD), "").unwrap();
        if let Some(script) = script {
            let path = folder.path().join(CUDA_BUILD);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        folder
    }

    async fn picked(choice: DeviceChoice, script: Option<&str>) -> Result<(String, Vec<DeviceChoice>, String), String> {
        let folder = installed(script);
        let picked = pick(choice, Path::new(""), Some(folder.path())).await.map_err(|error| error.one_line())?;
        let program = picked.program.strip_prefix(folder.path()).unwrap().display().to_string();
        Ok((program, picked.devices, picked.reason))
    }

    const TWO: &str = r#"[ "$*" = "devices --json" ] || exit 2
echo '{"gpus":[{"name":"a","memory_bytes":1,"architecture":"sm_80"},{"name":"b","memory_bytes":1,"architecture":"sm_80"}]}'"#;
    const NONE: &str = r#"echo '{"gpus":[],"absent":"the driver says: no device"}'"#;
    const NO_DRIVER: &str = "echo 'error while loading shared libraries: libcuda.so.1' >&2; exit 127";

    #[tokio::test]
    async fn auto_takes_all_gpus_in_turns() {
        let (program, devices, reason) = picked(DeviceChoice::Auto, Some(TWO)).await.unwrap();
        assert_eq!((program.as_str(), &devices[..]), (CUDA_BUILD, &[DeviceChoice::Cuda(0), DeviceChoice::Cuda(1)][..]));
        assert!(reason.contains("2 GPUs"), "{reason}");
        let picked = Picked { program: PathBuf::new(), devices, reason, was_chosen: true };
        assert!(picked.told().unwrap().starts_with("computing on cuda:0, cuda:1: "));
        assert_eq!([0, 1, 2].map(|index| picked.device(index).to_string()), ["cuda:0", "cuda:1", "cuda:0"]);
    }

    #[tokio::test]
    async fn auto_takes_the_cpu_and_says_why_where_no_gpu_can_be_used() {
        for (script, why) in [
            (None, "no espalier-worker-cuda"),
            (Some(NONE), "no device"),
            (Some(NO_DRIVER), "libcuda.so.1"),
            (Some("echo nonsense"), "something else"),
        ] {
            let (program, devices, reason) = picked(DeviceChoice::Auto, script).await.unwrap();
            assert_eq!((program.as_str(), &devices[..]), (CPU_BUILD, &[DeviceChoice::Cpu][..]));
            assert!(reason.contains(why), "{reason}");
        }
    }

    #[tokio::test]
    async fn a_gpu_that_is_asked_for_is_had_or_refused() {
        let (program, devices, _) = picked(DeviceChoice::Cuda(1), Some(TWO)).await.unwrap();
        assert_eq!((program.as_str(), &devices[..]), (CUDA_BUILD, &[DeviceChoice::Cuda(1)][..]));
        for (script, why) in
            [(None, "no espalier-worker-cuda"), (Some(NONE), "no device"), (Some(NO_DRIVER), "libcuda")]
        {
            let refusal = picked(DeviceChoice::Cuda(0), script).await.unwrap_err();
            assert!(refusal.starts_with("--device cuda:0: ") && refusal.contains(why), "{refusal}");
        }
        let refusal = picked(DeviceChoice::Cuda(2), Some(TWO)).await.unwrap_err();
        assert!(refusal.contains("has 2"), "{refusal}");
    }

    #[tokio::test]
    async fn the_cpu_is_taken_without_asking_and_a_configured_program_as_it_is() {
        let (program, devices, _) = picked(DeviceChoice::Cpu, Some("exit 1")).await.unwrap();
        assert_eq!((program.as_str(), &devices[..]), (CPU_BUILD, &[DeviceChoice::Cpu][..]));
        let folder = installed(Some(TWO));
        let picked = pick(DeviceChoice::Auto, Path::new("/opt/mine"), Some(folder.path())).await.unwrap();
        assert_eq!(picked.told(), None);
        assert_eq!((picked.program, picked.devices), (PathBuf::from("/opt/mine"), vec![DeviceChoice::Auto]));
    }
}
