//! What the machine has and can do: memory, speed, instruction set.

use candle_core::{DType, Device, Tensor};
use espalier_common::clock::Stopwatch;

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

/// Speed of f32 matrix products in GFLOP/s: the best of a few, in about 30 ms. 0 if they fail.
pub fn measure_gflops() -> f64 {
    const SIDE: usize = 512;
    const BUDGET_SECONDS: f64 = 0.03;
    let measure = || -> candle_core::Result<f64> {
        let matrix = Tensor::ones((SIDE, SIDE), DType::F32, &Device::Cpu)?;
        let flops = 2.0 * (SIDE as f64).powi(3);
        let whole = Stopwatch::start();
        let mut best = 0.0_f64;
        while whole.seconds() < BUDGET_SECONDS {
            let one = Stopwatch::start();
            matrix.matmul(&matrix)?;
            best = best.max(flops / one.seconds().max(1e-9) / 1e9);
        }
        Ok(best)
    };
    measure().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_described() {
        assert!(measure_gflops() > 0.0);
        assert!(instruction_set().starts_with(std::env::consts::ARCH));
        if cfg!(target_os = "linux") {
            assert!(peak_rss_bytes() > 1 << 20);
            assert!(machine_bytes().is_some_and(|bytes| bytes > peak_rss_bytes()));
        }
    }
}
