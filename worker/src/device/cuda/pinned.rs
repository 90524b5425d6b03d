//! Host memory that is pinned: a GPU copies from and to it by itself, at twice the speed of other memory and more.

use candle_core::cuda_backend::cudarc::driver::result::{free_host, malloc_host, stream};
use candle_core::cuda_backend::{CudaDevice, WrapErr as _};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, Result, Storage, Tensor, bail};

use super::launch::f32_view;

/// A contiguous f32 tensor of a GPU, copied to pinned memory of the host.
#[derive(Debug)]
pub struct Pinned {
    device: CudaDevice,
    start: *mut f32,
    length: usize,
}

#[allow(unsafe_code, reason = "the memory is the driver's, the pointer is ours alone")]
// SAFETY: `start` points to memory that nobody else has, and that is written before `copy_of` returns and only read after.
unsafe impl Send for Pinned {}
#[allow(unsafe_code, reason = "the memory is the driver's, the pointer is ours alone")]
// SAFETY: as above; a shared reference only reads.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Copies a tensor to the host.
    ///
    /// # Errors
    /// If the host has no memory that can be pinned, the driver refuses, or the tensor is not an f32 one of a GPU.
    pub fn copy_of(tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.contiguous()?;
        let (storage, layout) = tensor.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { bail!("only tensors of a GPU are pinned") };
        let (device, view) = (storage.device.clone(), f32_view(storage, layout)?);
        let cuda_stream = device.cuda_stream();
        cuda_stream.context().bind_to_thread().w()?;
        let length = view.len();
        #[allow(unsafe_code, reason = "pinned memory is the driver's to give")]
        // SAFETY: the size is not zero, and what comes back is freed by `drop`, once.
        let start = unsafe { malloc_host(length.max(1) * size_of::<f32>(), 0) }.w()?.cast::<f32>();
        let pinned = Self { device: device.clone(), start, length };
        #[allow(unsafe_code, reason = "the driver gave as many bytes")]
        // SAFETY: `start` is aligned for any type and points to `length` f32 that nobody else refers to. They are plain numbers,
        // of which the copy below writes all before they are read.
        let host = unsafe { std::slice::from_raw_parts_mut(pinned.start, length) };
        cuda_stream.memcpy_dtoh(&view, host).w()?;
        #[allow(unsafe_code, reason = "the driver waits for a raw stream")]
        // SAFETY: the stream lives as long as the device that `pinned` has.
        unsafe { stream::synchronize(cuda_stream.cu_stream()) }.w()?;
        Ok(pinned)
    }

    /// The tensor `[rows, columns]`, back on its device.
    ///
    /// # Errors
    /// What the driver says.
    pub fn load(&self, shape: (usize, usize)) -> Result<Tensor> {
        if shape.0 * shape.1 != self.length {
            bail!("{} pinned numbers are no {shape:?} matrix", self.length);
        }
        #[allow(unsafe_code, reason = "the driver gave as many bytes")]
        // SAFETY: `copy_of` has written all of them, and nobody writes again.
        let host = unsafe { std::slice::from_raw_parts(self.start, self.length) };
        let cuda_stream = self.device.cuda_stream();
        let slice = cuda_stream.clone_htod(host).w()?;
        // The copy must be through before this memory may be given back.
        cuda_stream.synchronize().w()?;
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, self.device.clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // A context that is gone took its memory along.
        if self.device.cuda_stream().context().bind_to_thread().is_ok() {
            #[allow(unsafe_code, reason = "pinned memory is given back to the driver")]
            // SAFETY: it came from `malloc_host`, nobody refers to it any more, and every copy from it was waited for.
            let _ = unsafe { free_host(self.start.cast()) };
        }
    }
}
