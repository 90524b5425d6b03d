//! Cholesky factors by cuSOLVER, and their inverses by cuBLAS.
//!
//! Both libraries take matrices by columns, where our row-major lower triangle is an upper one: `A = LLᵀ` is their `A = UᵀU`
//! with `U = Lᵀ` in the very same memory, and the `X` of `UX = I` is our `L⁻¹`.

use std::cell::RefCell;
use std::ptr;

use candle_core::cuda_backend::WrapErr as _;
use candle_core::cuda_backend::cudarc::cublas::sys as cublas;
use candle_core::cuda_backend::cudarc::cusolver::sys as cusolver;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtrMut as _};
use candle_core::{CudaStorage, Error, Layout, Result};

use super::launch::{f32_like, f32_view, launch, mutable_pointer_of, pointer_of};
use crate::device::kernels::{Arg, Launch};
use crate::linalg::factor::NotPositiveDefinite;

/// A cuSOLVER handle. It belongs to the context in which it was made, and stays with the thread that made it.
struct Solver {
    handle: cusolver::cusolverDnHandle_t,
    /// The number of its GPU.
    ordinal: usize,
}

thread_local! {
    static SOLVER: RefCell<Option<Solver>> = const { RefCell::new(None) };
}

impl Drop for Solver {
    fn drop(&mut self) {
        #[allow(unsafe_code, reason = "cuSOLVER is a C library")]
        // SAFETY: the handle was made by `cusolverDnCreate` and is destroyed once.
        let _ = unsafe { cusolver::cusolverDnDestroy(self.handle) };
    }
}

/// Runs `work` with this thread's handle, working in `stream`.
fn with_solver<T>(stream: &CudaStream, work: impl FnOnce(cusolver::cusolverDnHandle_t) -> Result<T>) -> Result<T> {
    stream.context().bind_to_thread().w()?;
    SOLVER.with_borrow_mut(|solver| {
        let ordinal = stream.context().ordinal();
        if solver.as_ref().is_none_or(|solver| solver.ordinal != ordinal) {
            let mut handle = ptr::null_mut();
            #[allow(unsafe_code, reason = "cuSOLVER is a C library")]
            // SAFETY: the context is this thread's, and `handle` is there to be written.
            done("cusolverDnCreate", unsafe { cusolver::cusolverDnCreate(&raw mut handle) })?;
            *solver = Some(Solver { handle, ordinal });
        }
        let handle = solver.as_ref().expect("it was just made").handle;
        #[allow(unsafe_code, reason = "cuSOLVER is a C library")]
        // SAFETY: handle and stream are of one context, and both live longer than the work.
        done("cusolverDnSetStream", unsafe { cusolver::cusolverDnSetStream(handle, stream.cu_stream().cast()) })?;
        work(handle)
    })
}

fn done(what: &str, status: cusolver::cusolverStatus_t) -> Result<()> {
    match status {
        cusolver::cusolverStatus_t::CUSOLVER_STATUS_SUCCESS => Ok(()),
        // Memory of its own that it could not have.
        cusolver::cusolverStatus_t::CUSOLVER_STATUS_ALLOC_FAILED => Err(super::out_of_memory()),
        status => Err(Error::Cuda(format!("{what} failed with {status:?}").into())),
    }
}

/// See [`crate::device::kernels::inverse_of_cholesky`].
pub(in crate::device) fn inverse_of_cholesky(
    matrix: &CudaStorage,
    layout: &Layout,
    n: usize,
) -> Result<std::result::Result<CudaStorage, NotPositiveDefinite>> {
    let whole = Layout::contiguous((n, n));
    let device = matrix.device.clone();
    let stream = device.cuda_stream();
    let mut factor = f32_like(matrix, n * n)?;
    stream.memcpy_dtod(&f32_view(matrix, layout)?, factor.as_cuda_slice_mut::<f32>()?).w()?;
    let info = factorise(&mut factor, &whole, n)?;
    if info > 0 {
        return Ok(Err(NotPositiveDefinite { pivot: info as usize - 1 }));
    }
    if info < 0 {
        return Err(Error::Cuda(format!("cusolverDnSpotrf did not take argument {}", -info).into()));
    }
    let mut inverse = f32_like(matrix, n * n)?;
    launch(Launch::over("identity", n * n), vec![Arg::Write(&mut inverse, &whole), Arg::Count(n)])?;
    {
        let (a, _a) = pointer_of(&factor, &whole, &stream)?;
        let (b, _b) = mutable_pointer_of(&mut inverse, &whole, &stream)?;
        let blas = device.cublas_handle();
        let size = i32::try_from(n).map_err(Error::wrap)?;
        let one = 1.0f32;
        #[allow(unsafe_code, reason = "cuBLAS is a C library")]
        // SAFETY: `a` and `b` are n by n f32 each, apart from each other; the handle works in the stream that both are ordered by;
        // the factor 1 is on the host, where the handle expects it unless told otherwise.
        let status = unsafe {
            cublas::cublasStrsm_v2(
                *blas.handle(),
                cublas::cublasSideMode_t::CUBLAS_SIDE_LEFT,
                cublas::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                cublas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
                size,
                size,
                &raw const one,
                a as *const f32,
                size,
                b as *mut f32,
                size,
            )
        };
        status.result().w()?;
    }
    Ok(Ok(inverse))
}

/// Puts the factor in place of the triangle that is read; returns cuSOLVER's word on it: the pivot that failed, from 1.
fn factorise(matrix: &mut CudaStorage, layout: &Layout, n: usize) -> Result<i32> {
    let device = matrix.device.clone();
    let stream = device.cuda_stream();
    let size = i32::try_from(n).map_err(Error::wrap)?;
    let upper = cusolver::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;
    let mut info = device.alloc_zeros::<i32>(1)?;
    with_solver(&stream, |handle| {
        let (a, _a) = mutable_pointer_of(matrix, layout, &stream)?;
        let mut length = 0;
        #[allow(unsafe_code, reason = "cuSOLVER is a C library")]
        // SAFETY: `a` is n by n f32, and `length` is there to be written.
        let status =
            unsafe { cusolver::cusolverDnSpotrf_bufferSize(handle, upper, size, a as *mut f32, size, &raw mut length) };
        done("cusolverDnSpotrf_bufferSize", status)?;
        let mut scratch = device.alloc_zeros::<f32>(length.max(1) as usize)?;
        let (work, _work) = scratch.device_ptr_mut(&stream);
        let (told, _told) = info.device_ptr_mut(&stream);
        #[allow(unsafe_code, reason = "cuSOLVER is a C library")]
        // SAFETY: as above; `work` has as many f32 as were asked for, and `told` one i32.
        let status = unsafe {
            cusolver::cusolverDnSpotrf(
                handle,
                upper,
                size,
                a as *mut f32,
                size,
                work as *mut f32,
                length,
                told as *mut i32,
            )
        };
        done("cusolverDnSpotrf", status)
    })?;
    Ok(device.clone_dtoh(&info)?[0])
}
