//! The pool that a GPU's memory comes from. What is freed stays in it, up to a bound: given back to the driver whenever somebody
//! waits for the GPU, which is the driver's default, each step would ask for it anew.

use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute::{
    self, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT, CU_MEMPOOL_ATTR_USED_MEM_CURRENT,
    CU_MEMPOOL_ATTR_USED_MEM_HIGH,
};
use candle_core::cuda_backend::cudarc::driver::sys::CUmemoryPool;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, DriverError, result};

/// The default pool of a context's device.
pub(super) struct Pool(CUmemoryPool);

impl Pool {
    pub(super) fn of(context: &CudaContext) -> Result<Self, DriverError> {
        context.bind_to_thread()?;
        #[allow(unsafe_code, reason = "the driver's raw pools")]
        // SAFETY: a context's device is one that the driver gave.
        Ok(Self(unsafe { result::device::get_default_mem_pool(context.cu_device()) }?))
    }

    /// Keeps so many bytes of what is freed.
    pub(super) fn keep(&self, mut bytes: u64) -> Result<(), DriverError> {
        #[allow(unsafe_code, reason = "the driver's raw pools")]
        // SAFETY: a device's default pool lives as long as the driver, and the threshold is 64 bits.
        unsafe {
            result::mem_pool::set_attribute(self.0, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut bytes).cast())
        }
    }

    /// Bytes that it has of the GPU, and nobody uses.
    pub(super) fn idle_bytes(&self) -> Result<u64, DriverError> {
        let reserved = self.number(CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        Ok(reserved.saturating_sub(self.number(CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?))
    }

    /// The most bytes that were in use at a time.
    pub(super) fn peak_bytes(&self) -> Result<u64, DriverError> {
        self.number(CU_MEMPOOL_ATTR_USED_MEM_HIGH)
    }

    fn number(&self, attribute: CUmemPool_attribute) -> Result<u64, DriverError> {
        let mut number = 0u64;
        #[allow(unsafe_code, reason = "the driver's raw pools")]
        // SAFETY: a device's default pool lives as long as the driver, and these attributes are 64 bits.
        unsafe { result::mem_pool::get_attribute(self.0, attribute, (&raw mut number).cast()) }?;
        Ok(number)
    }
}
