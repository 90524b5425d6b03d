//! The device that is asked for becomes the one there is, or a refusal.

use candle_core::Device;
use espalier_common::device::{DeviceChoice, Devices};

use super::{DeviceError, backend};

/// A device that is open.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// What computes layers; matrices are solved on it where there are kernels for that, and else on the host.
    pub device: Device,
    /// What people are told: `cpu`, or `cuda:0 (NVIDIA H100)`.
    pub label: String,
    /// What results depend on besides the host's instruction set, e.g. `cuda-sm_90`; `None` for the CPU.
    pub arithmetic: Option<String>,
    /// Why it is this one.
    pub reason: String,
}

/// What a choice comes to, before anything is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Decision {
    /// The number of a GPU, or none for the CPU.
    gpu: Option<usize>,
    reason: String,
}

/// What this build can use on this machine.
pub fn devices() -> Devices {
    match backend::gpus() {
        Ok(gpus) if gpus.is_empty() => Devices { gpus, absent: Some("the CUDA driver finds no GPU".to_owned()) },
        Ok(gpus) => Devices { gpus, absent: None },
        Err(reason) => Devices { gpus: Vec::new(), absent: Some(reason) },
    }
}

/// Opens the device that is asked for. `tf32` lets matrix products of a GPU round their factors to 10 bits of mantissa.
///
/// # Errors
/// `Absent`, `NoSuchGpu` if a GPU is asked for that cannot be had, `Tf32` if there is nothing that it would be about; `Open`.
pub fn open(choice: DeviceChoice, tf32: bool) -> Result<Chosen, DeviceError> {
    // Asking wakes a driver, which takes time; nobody needs it for the CPU.
    let found = if choice == DeviceChoice::Cpu { Devices::default() } else { devices() };
    let Decision { gpu, reason } = decide(choice, &found)?;
    let Some(number) = gpu else {
        if tf32 {
            return Err(DeviceError::Tf32 { reason });
        }
        return Ok(Chosen { device: Device::Cpu, label: "cpu".to_owned(), arithmetic: None, reason });
    };
    let device = backend::open(number, tf32).map_err(|source| DeviceError::Open { number, source })?;
    let gpu = &found.gpus[number];
    let rounding = if tf32 { "+tf32" } else { "" };
    Ok(Chosen {
        device,
        label: format!("cuda:{number} ({})", gpu.name),
        arithmetic: Some(format!("cuda-{}{rounding}", gpu.architecture)),
        reason,
    })
}

fn decide(choice: DeviceChoice, found: &Devices) -> Result<Decision, DeviceError> {
    let absent = || found.absent.clone().unwrap_or_default();
    match choice {
        DeviceChoice::Cpu => Ok(Decision { gpu: None, reason: "it was asked for".to_owned() }),
        DeviceChoice::Auto if found.gpus.is_empty() => Ok(Decision { gpu: None, reason: absent() }),
        DeviceChoice::Auto => Ok(Decision { gpu: Some(0), reason: "it is the first GPU".to_owned() }),
        DeviceChoice::Cuda(number) if found.gpus.is_empty() => {
            Err(DeviceError::Absent { choice: DeviceChoice::Cuda(number), reason: absent() })
        }
        DeviceChoice::Cuda(number) if number >= found.gpus.len() => {
            Err(DeviceError::NoSuchGpu { number, gpus: found.gpus.len() })
        }
        DeviceChoice::Cuda(number) => Ok(Decision { gpu: Some(number), reason: "it was asked for".to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::device::Gpu;
    use espalier_common::fault::FaultClass;

    use super::*;

    fn machine(gpus: usize) -> Devices {
        let gpu =
            |number| Gpu { name: format!("gpu {number}"), memory_bytes: 1 << 30, architecture: "sm_80".to_owned() };
        let absent = (gpus == 0).then(|| "the driver is asleep".to_owned());
        Devices { gpus: (0..gpus).map(gpu).collect(), absent }
    }

    #[test]
    fn auto_takes_the_first_gpu_and_else_the_cpu_with_the_reason() {
        assert_eq!(decide(DeviceChoice::Auto, &machine(2)).unwrap().gpu, Some(0));
        let decision = decide(DeviceChoice::Auto, &machine(0)).unwrap();
        assert_eq!(decision, Decision { gpu: None, reason: "the driver is asleep".to_owned() });
    }

    #[test]
    fn a_gpu_that_is_not_there_is_refused_in_one_line() {
        for (number, gpus, why) in [(0, 0, "the driver is asleep"), (2, 2, "has 2")] {
            let refusal = decide(DeviceChoice::Cuda(number), &machine(gpus)).unwrap_err();
            assert_eq!(refusal.class(), FaultClass::Reject);
            let refusal = refusal.to_string();
            assert!(refusal.contains(&format!("cuda:{number}")) && refusal.contains(why), "{refusal}");
            assert!(!refusal.contains('\n'));
        }
        assert_eq!(decide(DeviceChoice::Cuda(1), &machine(2)).unwrap().gpu, Some(1));
    }

    #[test]
    fn rounding_for_a_gpu_is_refused_on_the_cpu() {
        assert!(matches!(open(DeviceChoice::Cpu, true), Err(DeviceError::Tf32 { .. })));
        assert_eq!(open(DeviceChoice::Cpu, false).unwrap().label, "cpu");
    }
}
