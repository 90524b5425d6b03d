//! Kernels compiled and launched.

use std::sync::OnceLock;

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::WrapErr as _;
use candle_core::cuda_backend::cudarc::driver::sys::CUdeviceptr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg as _, SyncOnDrop,
};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use candle_core::{CudaStorage, Layout, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use crate::device::kernels::{Arg, Launch, SOURCE, THREADS};

/// The kernels as the driver takes them, compiled once in a process.
fn assembly() -> Result<&'static str> {
    static COMPILED: OnceLock<String> = OnceLock::new();
    if let Some(compiled) = COMPILED.get() {
        return Ok(compiled);
    }
    let options = CompileOptions {
        fmad: Some(false),
        ftz: Some(false),
        prec_div: Some(true),
        prec_sqrt: Some(true),
        ..CompileOptions::default()
    };
    let compiled = compile_ptx_with_opts(SOURCE, options).w()?;
    Ok(COMPILED.get_or_init(|| compiled.to_src()))
}

/// What an argument becomes: pointers and numbers that live until the launch is under way.
enum Value {
    Pointer(CUdeviceptr),
    Count(u64),
    Number(f32),
}

pub(in crate::device) fn launch(launch: Launch, mut args: Vec<Arg<'_, CudaStorage>>) -> Result<()> {
    let Some(device) = args.iter().find_map(|arg| match arg {
        Arg::Read(storage, _) => Some(storage.device.clone()),
        Arg::Write(storage, _) => Some(storage.device.clone()),
        _ => None,
    }) else {
        bail!("kernel {} has no tensor", launch.kernel)
    };
    let function = device.get_or_load_custom_func(launch.kernel, "espalier", assembly()?)?;
    let stream = device.cuda_stream();
    let mut guards = Vec::with_capacity(args.len());
    let mut values = Vec::with_capacity(args.len());
    for arg in &mut args {
        values.push(match arg {
            Arg::Read(storage, layout) => {
                let (pointer, guard) = pointer_of(storage, layout, &stream)?;
                guards.push(guard);
                Value::Pointer(pointer)
            }
            Arg::Write(storage, layout) => {
                let (pointer, guard) = mutable_pointer_of(storage, layout, &stream)?;
                guards.push(guard);
                Value::Pointer(pointer)
            }
            Arg::Count(count) => Value::Count(*count as u64),
            Arg::Number(number) => Value::Number(*number),
        });
    }
    let mut builder = function.builder();
    for value in &values {
        match value {
            Value::Pointer(pointer) => builder.arg(pointer),
            Value::Count(count) => builder.arg(count),
            Value::Number(number) => builder.arg(number),
        };
    }
    let config = LaunchConfig { grid_dim: (launch.blocks, 1, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
    #[allow(unsafe_code, reason = "a launch trusts its arguments")]
    // SAFETY: the custom ops pass what the kernel of this name declares, in its order: pointers to contiguous tensors of the
    // element type it reads, whose lengths follow from the counts beside them or are fixed, as those of a selection's position and
    // bins; every kernel stays within them. Tensors that are written are borrowed mutably. Guards order the launch with other uses and outlive it.
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn start_of(layout: &Layout) -> Result<usize> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start),
        None => bail!("a kernel wants a contiguous tensor, not one of shape {:?}", layout.shape()),
    }
}

/// The device address of a tensor's first element.
pub(super) fn pointer_of<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    fn of<'a, T: DeviceRepr>(
        slice: &'a CudaSlice<T>,
        start: usize,
        stream: &'a CudaStream,
    ) -> (CUdeviceptr, SyncOnDrop<'a>) {
        let (pointer, guard) = slice.device_ptr(stream);
        (pointer + (start * size_of::<T>()) as CUdeviceptr, guard)
    }
    let start = start_of(layout)?;
    match &storage.slice {
        CudaStorageSlice::U8(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::U32(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::F32(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::F64(slice) => Ok(of(slice, start, stream)),
        _ => bail!("a kernel wants u8, u32, f32 or f64"),
    }
}

/// The same of a tensor that is written.
pub(super) fn mutable_pointer_of<'a>(
    storage: &'a mut CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(CUdeviceptr, SyncOnDrop<'a>)> {
    fn of<'a, T: DeviceRepr>(
        slice: &'a mut CudaSlice<T>,
        start: usize,
        stream: &'a CudaStream,
    ) -> (CUdeviceptr, SyncOnDrop<'a>) {
        let (pointer, guard) = slice.device_ptr_mut(stream);
        (pointer + (start * size_of::<T>()) as CUdeviceptr, guard)
    }
    let start = start_of(layout)?;
    match &mut storage.slice {
        CudaStorageSlice::U8(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::U32(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::F32(slice) => Ok(of(slice, start, stream)),
        CudaStorageSlice::F64(slice) => Ok(of(slice, start, stream)),
        _ => bail!("a kernel wants u8, u32, f32 or f64"),
    }
}

/// A contiguous f32 tensor, to be copied from.
pub(super) fn f32_view<'a>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, f32>> {
    let start = start_of(layout)?;
    Ok(storage.as_cuda_slice::<f32>()?.slice(start..start + layout.shape().elem_count()))
}

/// The values of an f32 tensor of a GPU, row-major. A copy into pages that nobody has touched waits for each to be cleared, which
/// makes it a tenth as fast: all threads touch them first.
pub(in crate::device) fn to_host(tensor: &Tensor) -> Result<Vec<f32>> {
    /// Numbers that a thread touches at a time.
    const STRETCH: usize = 1 << 20;
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("the tensor is not on a GPU") };
    let view = f32_view(storage, layout)?;
    let mut values = vec![0.0; view.len()];
    values.par_chunks_mut(STRETCH).for_each(|stretch| stretch.fill(0.0));
    let stream = storage.device.cuda_stream();
    stream.memcpy_dtoh(&view, &mut values).w()?;
    stream.synchronize().w()?;
    Ok(values)
}

/// Memory for f32.
pub(in crate::device) fn f32_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    let device = &tensor.device;
    #[allow(unsafe_code, reason = "memory that is not cleared")]
    // SAFETY: every kernel that is given it writes all of it before anything reads it.
    let slice = unsafe { device.alloc::<f32>(length) }?;
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// Memory for bytes.
pub(in crate::device) fn u8_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    let device = &tensor.device;
    #[allow(unsafe_code, reason = "memory that is not cleared")]
    // SAFETY: every kernel that is given it writes all of it before anything reads it.
    let slice = unsafe { device.alloc::<u8>(length) }?;
    Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
}

/// Counts of zero.
pub(in crate::device) fn counts_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    let device = &tensor.device;
    Ok(CudaStorage::wrap_cuda_slice(device.alloc_zeros::<u32>(length)?, device.clone()))
}
