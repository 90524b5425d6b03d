//! CUDA: what the driver tells, devices that are opened, and memory that runs out.
//!
//! Everything of a device goes through one stream, in the order in which it was asked for. Kernels are launched by the thread
//! that owns the device; other threads at most copy a tensor that is complete to the host, in the same stream.

mod factor;
mod launch;
#[cfg(feature = "nccl")]
mod nccl;
#[cfg(not(feature = "nccl"))]
#[path = "without_nccl.rs"]
mod nccl;
mod pinned;
mod pool;

use candle_core::cuda_backend::cudarc::cublas::result::CublasError;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasStatus_t;
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute, cudaError_enum};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result};
use candle_core::cuda_backend::{CudaError, set_gemm_reduced_precision_f32};
use candle_core::{Device, Error, Result};
use espalier_common::device::Gpu;

pub(super) use self::factor::inverse_of_cholesky;
pub(super) use self::launch::{counts_like, f32_like, launch, to_host, u8_like};
pub(super) use self::nccl::carrier;
pub use self::pinned::Pinned;
use self::pool::Pool;

/// This part of what a GPU has free at first stays with a worker that has freed it: others may be on the same GPU.
const KEPT_SHARE: u64 = 4;

/// The GPUs there are, or why none can be used.
pub(super) fn gpus() -> std::result::Result<Vec<Gpu>, String> {
    let count =
        CudaContext::device_count().map_err(|error| format!("the CUDA driver cannot be used: {}", said(&error)))?;
    let describe = |number| describe(number).map_err(|error| format!("GPU {number} does not answer: {}", said(&error)));
    (0..count).map(describe).collect()
}

fn describe(number: i32) -> std::result::Result<Gpu, DriverError> {
    let device = result::device::get(number)?;
    let attribute = |attribute| {
        #[allow(unsafe_code, reason = "the driver's numbers of devices are plain integers")]
        // SAFETY: `device` was just given by the driver.
        unsafe {
            result::device::get_attribute(device, attribute)
        }
    };
    let major = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    #[allow(unsafe_code, reason = "the driver's numbers of devices are plain integers")]
    // SAFETY: `device` was just given by the driver.
    let memory_bytes = unsafe { result::device::total_mem(device) }? as u64;
    Ok(Gpu { name: result::device::get_name(device)?, memory_bytes, architecture: format!("sm_{major}{minor}") })
}

/// A driver's error without its debris: the text that the driver has for it, or its name.
fn said(error: &DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Opens a GPU with a stream of its own: the default of the tensor library is one stream a thread, and threads would not wait
/// for each other's.
pub(super) fn open(number: usize, tf32: bool) -> Result<Device> {
    set_gemm_reduced_precision_f32(tf32);
    let device = Device::new_cuda_with_stream(number)?;
    if let Some((pool, free)) = pool_of(&device).zip(free_bytes(&device))
        && let Err(error) = pool.keep(free / KEPT_SHARE)
    {
        tracing::warn!(%error, "freed memory goes back to the driver");
    }
    Ok(device)
}

fn pool_of(device: &Device) -> Option<Pool> {
    Pool::of(device.as_cuda_device().ok()?.cuda_stream().context()).ok()
}

/// Bytes of a GPU that nobody has; `None` for another device, or if the driver does not say.
pub(super) fn free_bytes(device: &Device) -> Option<u64> {
    device.as_cuda_device().ok()?.cuda_stream().context().bind_to_thread().ok()?;
    // Not every GPU has a pool.
    let idle = pool_of(device).and_then(|pool| pool.idle_bytes().ok()).unwrap_or(0);
    result::mem_get_info().ok().map(|(free, _)| free as u64 + idle)
}

/// The most bytes of a GPU that this process had in use at a time; 0 for another device, or if the driver does not say.
pub(super) fn peak_bytes(device: &Device) -> u64 {
    pool_of(device).and_then(|pool| pool.peak_bytes().ok()).unwrap_or(0)
}

/// Whether a GPU had no memory left.
pub(super) fn is_out_of_memory(error: &Error) -> bool {
    match error {
        Error::Cuda(cause) => match cause.downcast_ref::<CudaError>() {
            Some(CudaError::Cuda(DriverError(code)) | CudaError::Load { cuda: DriverError(code), .. }) => {
                *code == cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY
            }
            Some(CudaError::Cublas(CublasError(code))) => *code == cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED,
            _ => false,
        },
        Error::Context { inner, .. } | Error::WithPath { inner, .. } | Error::WithBacktrace { inner, .. } => {
            is_out_of_memory(inner)
        }
        _ => false,
    }
}

/// What the driver would say if it had no memory left.
fn out_of_memory() -> Error {
    CudaError::Cuda(DriverError(cudaError_enum::CUDA_ERROR_OUT_OF_MEMORY)).into()
}
