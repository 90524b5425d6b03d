//! Where tests of passes run: on every device there is, and for kernels on the host too, by way of its C++ compiler.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use candle_core::{CpuStorage, Device};
use espalier_common::device::DeviceChoice;

use crate::device::kernels::{Arg, Call, Launch};

/// Every device that this build and machine have; says so if there is no GPU.
#[allow(clippy::print_stderr, reason = "what a test leaves out is said out loud")]
pub(crate) fn devices() -> Vec<Device> {
    let found = crate::device::devices();
    if let Some(absent) = found.absent {
        eprintln!("SKIPPED on GPUs: {absent}");
        return vec![Device::Cpu];
    }
    vec![Device::Cpu, crate::device::open(DeviceChoice::Cuda(0), false).unwrap().device]
}

/// The kernels compiled for the host, once in a process; `None` without a compiler.
#[allow(clippy::print_stderr, reason = "what a test leaves out is said out loud")]
fn program() -> Option<&'static Path> {
    static COMPILED: OnceLock<Option<(tempfile::TempDir, PathBuf)>> = OnceLock::new();
    let compiled = COMPILED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("kernels");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/device/kernels/host.cpp");
        let compiler = Command::new("c++")
            .args(["-std=c++20", "-O1", "-ffp-contract=off", "-pthread", "-o"])
            .args([&program, &source])
            .output();
        match compiler {
            Ok(output) if output.status.success() => Some((folder, program)),
            Ok(output) => panic!("the kernels do not compile:\n{}", String::from_utf8_lossy(&output.stderr)),
            Err(error) => {
                eprintln!("SKIPPED: kernels on the host: there is no C++ compiler: {error}");
                None
            }
        }
    });
    compiled.as_ref().map(|(_, program)| program.as_path())
}

/// The bytes of a tensor on the host.
fn bytes(storage: &CpuStorage) -> Vec<u8> {
    match storage {
        CpuStorage::U8(values) => values.clone(),
        CpuStorage::U32(values) => bytemuck::cast_slice(values).to_vec(),
        CpuStorage::F32(values) => bytemuck::cast_slice(values).to_vec(),
        CpuStorage::F64(values) => bytemuck::cast_slice(values).to_vec(),
        other => panic!("no kernel takes {other:?}"),
    }
}

fn set_bytes(storage: &mut CpuStorage, bytes: &[u8]) {
    match storage {
        CpuStorage::U8(values) => values.copy_from_slice(bytes),
        CpuStorage::U32(values) => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
        CpuStorage::F32(values) => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
        CpuStorage::F64(values) => bytemuck::cast_slice_mut(values).copy_from_slice(bytes),
        other => panic!("no kernel takes {other:?}"),
    }
}

/// Runs a kernel on the host, launched as on a GPU; false, out loud, where that cannot be done. Tensors must be whole storages.
pub(crate) fn run(call: Call<'_, CpuStorage>) -> bool {
    let Some(program) = program() else { return false };
    let Call { launch: Launch { kernel, blocks }, mut args } = call;
    let mut told = format!("{kernel} {blocks} {}\n", args.len()).into_bytes();
    let mut memory = Vec::new();
    for arg in &args {
        let (kind, number) = match arg {
            Arg::Read(storage, _) => ('b', push(&mut memory, &bytes(storage))),
            Arg::Write(storage, _) => ('b', push(&mut memory, &bytes(storage))),
            Arg::Count(count) => ('c', *count as u64),
            Arg::Number(number) => ('n', u64::from(number.to_bits())),
        };
        writeln!(told, "{kind} {number}").unwrap();
    }
    told.extend(memory);
    let mut child = Command::new(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&told));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    assert!(output.status.success(), "{kernel}: {}", output.status);
    let mut rest = output.stdout.as_slice();
    for arg in &mut args {
        let length = match arg {
            Arg::Read(storage, _) => bytes(storage).len(),
            Arg::Write(storage, _) => bytes(storage).len(),
            _ => continue,
        };
        let (own, others) = rest.split_at(length);
        rest = others;
        match arg {
            Arg::Write(storage, _) => set_bytes(storage, own),
            Arg::Read(storage, _) => assert_eq!(own, bytes(storage), "{kernel} writes what it should only read"),
            _ => {}
        }
    }
    true
}

fn push(memory: &mut Vec<u8>, bytes: &[u8]) -> u64 {
    memory.extend(bytes);
    bytes.len() as u64
}
