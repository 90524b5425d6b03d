//! What the machine has and can do: memory, speed, instruction set.

use candle_core::{DType, Device, Error, Tensor};
use espalier_common::clock::Stopwatch;
use std::os::unix::fs::MetadataExt as _;

use super::backend;
pub use super::backend::Pinned;

/// The elements of an f32 tensor, row-major, on the host.
///
/// # Errors
/// If it is of another type, or what the backend says.
pub fn to_host(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    if tensor.device().is_cpu() { tensor.flatten_all()?.to_vec1() } else { backend::to_host(tensor) }
}

/// Bytes of a GPU that nobody has; `None` for the CPU, or if the driver does not say.
pub fn free_bytes(device: &Device) -> Option<u64> {
    backend::free_bytes(device)
}

/// The most bytes of a GPU's memory that this process used at a time; 0 for the CPU, or if the driver does not say.
pub fn peak_device_bytes(device: &Device) -> u64 {
    backend::peak_bytes(device)
}

/// Whether a GPU had no memory left.
pub fn is_out_of_memory(error: &Error) -> bool {
    backend::is_out_of_memory(error)
}

/// Largest resident size of this process so far, in bytes; 0 where the system does not tell.
pub fn peak_rss_bytes() -> u64 {
    kilobytes_of("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Memory of the machine in bytes, if the system tells.
pub fn machine_bytes() -> Option<u64> {
    kilobytes_of("/proc/meminfo", "MemTotal:")
}

fn kilobytes_of(path: &str, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The instruction set that the matrix kernels choose by: results are the same bits only within one.
pub fn instruction_set() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let extension = if std::arch::is_x86_feature_detected!("avx512f") {
            "+avx512f"
        } else if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            "+avx2"
        } else {
            ""
        };
        format!("x86_64{extension}")
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::env::consts::ARCH.to_owned()
}

/// Speed of f32 matrix products of a device in GFLOP/s: the best of some, in about a tenth of a second. 0 if they fail.
///
/// Workers and a coordinator that start on one machine take processors from each other, and who was interrupted in all of its
/// products would seem slow and get little to do for the whole run. So a product on processors is short: half a millisecond.
pub fn measure_gflops(device: &Device) -> f64 {
    const BUDGET_SECONDS: f64 = 0.1;
    // A small product does not keep a GPU busy.
    let side = if device.is_cpu() { side_for(rayon::current_num_threads()) } else { 4096 };
    let measure = || -> candle_core::Result<f64> {
        let matrix = Tensor::ones((side, side), DType::F32, device)?;
        let flops = 2.0 * (side as f64).powi(3);
        if !device.is_cpu() {
            // The first product loads its kernel.
            matrix.matmul(&matrix)?;
            device.synchronize()?;
        }
        let whole = Stopwatch::start();
        let mut best = 0.0_f64;
        while whole.seconds() < BUDGET_SECONDS {
            let one = Stopwatch::start();
            matrix.matmul(&matrix)?;
            device.synchronize()?;
            best = best.max(flops / one.seconds().max(1e-9) / 1e9);
        }
        Ok(best)
    };
    measure().unwrap_or(0.0)
}

/// Rows and columns of a product of which each of so many threads has as much as one of 256³.
fn side_for(threads: usize) -> usize {
    ((threads as f64).cbrt() * 256.0) as usize / 64 * 64
}

/// Names this machine, as it was booted; a name of this process alone if the system does not say.
pub fn host_name() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if boot.trim().is_empty() { format!("process-{}", std::process::id()) } else { boot.trim().to_owned() }
}

/// Names this machine and user as far as they can share memory: processes in another network namespace count as being elsewhere,
/// where they have other folders as a rule.
pub fn neighbourhood() -> String {
    let network = std::fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let user = std::fs::metadata("/proc/self").map(|about| about.uid()).unwrap_or_default();
    format!("{}/{}/{user}", host_name(), network.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        assert!(measure_gflops(&Device::Cpu) > 0.0);
        assert_eq!([1, 2, 16, 128].map(side_for), [256, 320, 640, 1280]);
        assert!(instruction_set().starts_with(std::env::consts::ARCH));
        if cfg!(target_os = "linux") {
            assert!(peak_rss_bytes() > 1 << 20);
            assert!(machine_bytes().is_some_and(|bytes| bytes > peak_rss_bytes()));
        }
    }
}
