//! NCCL: one side of a pair of GPUs. It begins things and looks how they stand; whether they may still take longer is decided
//! where all libraries are watched, in `transport/communicator`.

use std::ffi::CStr;
use std::fmt::Display;
use std::sync::Arc;

use candle_core::Device;
use candle_core::cuda_backend::cudarc::driver::result::event;
use candle_core::cuda_backend::cudarc::driver::sys::cudaError_enum;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr as _, DevicePtrMut as _, DriverError,
};
use candle_core::cuda_backend::cudarc::nccl::result::{self, NcclError, NcclStatus};
use candle_core::cuda_backend::cudarc::nccl::sys;
use espalier_common::report::LinkKind;

use crate::device::memory::host_name;
use crate::transport::BodyError;
use crate::transport::communicator::Communicator;
use crate::transport::negotiation::{Carrier, Facts};

/// `NCCL_CONFIG_INITIALIZER`, of the version whose header the bindings are made from; an older library is told its own version,
/// and reads no further. What is undefined the library chooses.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const CONFIG_VERSION: u32 = 23_000;
const UNDEFINED: i32 = i32::MIN;

/// What joins a GPU with another worker's, or why nothing does.
pub(in crate::device) fn carrier(device: &Device, leaves_host: bool) -> Result<Arc<dyn Carrier>, String> {
    let Ok(device) = device.as_cuda_device() else { return Err("the worker computes on the CPU".to_owned()) };
    let context = Arc::clone(device.cuda_stream().context());
    let version = result::get_nccl_version().map_err(|error| format!("NCCL does not answer: {}", named(&error)))?;
    let told = || -> Result<_, DriverError> { Ok((context.uuid()?, context.compute_capability()?)) };
    let (uuid, (major, minor)) = told().map_err(|error| format!("the GPU does not answer: {error}"))?;
    let device = uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect();
    let facts = Facts {
        kind: LinkKind::Nccl,
        version: version.unsigned_abs(),
        host: host_name(),
        device,
        architecture: format!("sm_{major}{minor}"),
        leaves_host,
    };
    Ok(Arc::new(Nccl { context, facts }))
}

fn named(error: &NcclError) -> String {
    format!("{:?}", error.0)
}

fn failed(doing: &'static str, said: impl Display) -> BodyError {
    BodyError::Library { doing, said: said.to_string() }
}

/// NCCL on one GPU.
#[derive(Debug)]
struct Nccl {
    context: Arc<CudaContext>,
    facts: Facts,
}

impl Carrier for Nccl {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn new_id(&self) -> Result<Vec<u8>, BodyError> {
        let id = result::get_uniqueid().map_err(|error| failed("naming a pair", named(&error)))?;
        Ok(id.internal.iter().map(|&byte| byte as u8).collect())
    }

    fn join(&self, id: &[u8], rank: u32) -> Result<Box<dyn Communicator>, BodyError> {
        const JOINING: &str = "joining a pair of GPUs";
        let mut name = sys::ncclUniqueId { internal: [0; 128] };
        if id.len() != name.internal.len() {
            return Err(failed(JOINING, format!("a name has 128 bytes, not {}", id.len())));
        }
        name.internal.iter_mut().zip(id).for_each(|(place, &byte)| *place = byte as _);
        self.context.bind_to_thread().map_err(|error| failed(JOINING, error))?;
        // Its own stream: a transfer that waits for the other side must not hold up what is computed.
        let stream = self.context.new_stream().map_err(|error| failed(JOINING, error))?;
        let mut config = sys::ncclConfig_t {
            size: size_of::<sys::ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION.min(self.facts.version),
            // No call waits for the other side.
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: UNDEFINED,
            netName: std::ptr::null(),
            splitShare: UNDEFINED,
            trafficClass: UNDEFINED,
            commName: std::ptr::null(),
            collnetEnable: UNDEFINED,
            CTAPolicy: UNDEFINED,
            shrinkShare: UNDEFINED,
            nvlsCTAs: UNDEFINED,
            nChannelsPerNetPeer: UNDEFINED,
            nvlinkCentricSched: UNDEFINED,
            graphUsageMode: UNDEFINED,
            numRmaCtx: UNDEFINED,
            maxP2pPeers: UNDEFINED,
        };
        let mut raw = std::ptr::null_mut();
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: both pointers are to locals that live through the call, which copies the configuration. The GPU's context is
        // this thread's.
        let joined = unsafe { result::comm_init_rank_config(&mut raw, 2, name, rank as i32, &mut config) };
        let pair = Pair { raw, peer: 1 - rank as i32, stream, buffer: None, doing: Doing::Calling };
        match joined {
            Ok(_) => Ok(Box::new(pair)),
            Err(error) => Err(pair.failed(JOINING, &error)),
        }
    }
}

/// What was begun last.
enum Doing {
    /// A call that the library has not finished: joining.
    Calling,
    /// A transfer that it has not launched.
    Launching,
    /// A transfer, which has passed once the event has.
    Moving(CudaEvent),
    /// Taking leave.
    Leaving,
    Nothing,
}

/// One side of a pair. It never leaves the thread that made it.
struct Pair {
    /// Null once it is destroyed or aborted.
    raw: sys::ncclComm_t,
    peer: i32,
    stream: Arc<CudaStream>,
    /// The body under way, or what came last.
    buffer: Option<CudaSlice<u8>>,
    doing: Doing,
}

impl Pair {
    fn failed(&self, doing: &'static str, error: &NcclError) -> BodyError {
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: a communicator that is null is allowed. What comes back is null or a string of the library, which is copied
        // before the next call.
        let said = unsafe {
            let said = sys::ncclGetLastError(self.raw);
            (!said.is_null()).then(|| CStr::from_ptr(said).to_string_lossy().into_owned())
        };
        match said.filter(|said| !said.is_empty()) {
            Some(said) => failed(doing, format!("{}: {said}", named(error))),
            None => failed(doing, named(error)),
        }
    }

    /// Whether the library has finished the last call; what went wrong since, if anything has.
    fn is_called(&self, doing: &'static str) -> Result<bool, BodyError> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: the communicator is alive, and the pointer is to a local.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.raw, &mut state) };
        for result in [asked, state] {
            match result.result() {
                Ok(NcclStatus::InProgress) => return Ok(false),
                Ok(_) => {}
                Err(error) => return Err(self.failed(doing, &error)),
            }
        }
        Ok(true)
    }

    fn is_alive(&self, doing: &'static str) -> Result<(), BodyError> {
        if self.raw.is_null() { Err(failed(doing, "the pair has ended")) } else { Ok(()) }
    }
}

impl Communicator for Pair {
    fn seat(&mut self) -> Result<(u32, u32), BodyError> {
        const DOING: &str = "asking for a rank";
        self.is_alive(DOING)?;
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: the communicator is alive and has joined.
        let seat =
            unsafe { result::comm_user_rank(self.raw).and_then(|rank| Ok((rank, result::comm_count(self.raw)?))) };
        let (rank, ranks) = seat.map_err(|error| self.failed(DOING, &error))?;
        Ok((rank.unsigned_abs(), ranks.unsigned_abs()))
    }

    fn begin_send(&mut self, body: &[u8]) -> Result<(), BodyError> {
        const DOING: &str = "sending";
        self.is_alive(DOING)?;
        let buffer = self.stream.clone_htod(body).map_err(|error| failed(DOING, error))?;
        let launched = {
            let (pointer, _in_use) = buffer.device_ptr(&self.stream);
            let stream = self.stream.cu_stream().cast();
            #[allow(unsafe_code, reason = "the library's C interface")]
            // SAFETY: the buffer has as many bytes, and stays until what is launched in the stream has passed, or the
            // communicator is aborted.
            unsafe {
                result::send(
                    pointer as *const _,
                    body.len(),
                    sys::ncclDataType_t::ncclUint8,
                    self.peer,
                    self.raw,
                    stream,
                )
            }
        };
        (self.buffer, self.doing) = (Some(buffer), Doing::Launching);
        launched.map(drop).map_err(|error| self.failed(DOING, &error))
    }

    fn begin_receive(&mut self, bytes: usize) -> Result<(), BodyError> {
        const DOING: &str = "receiving";
        self.is_alive(DOING)?;
        let mut buffer = self.stream.alloc_zeros::<u8>(bytes).map_err(|error| failed(DOING, error))?;
        let launched = {
            let (pointer, _in_use) = buffer.device_ptr_mut(&self.stream);
            let stream = self.stream.cu_stream().cast();
            #[allow(unsafe_code, reason = "the library's C interface")]
            // SAFETY: as for sending.
            unsafe {
                result::recv(pointer as *mut _, bytes, sys::ncclDataType_t::ncclUint8, self.peer, self.raw, stream)
            }
        };
        (self.buffer, self.doing) = (Some(buffer), Doing::Launching);
        launched.map(drop).map_err(|error| self.failed(DOING, &error))
    }

    fn is_done(&mut self) -> Result<bool, BodyError> {
        match &self.doing {
            Doing::Nothing => Ok(true),
            Doing::Calling => {
                let is_done = self.is_called("joining a pair of GPUs")?;
                if is_done {
                    self.doing = Doing::Nothing;
                }
                Ok(is_done)
            }
            Doing::Launching => {
                if self.is_called("launching a transfer")? {
                    let passed = self.stream.record_event(None);
                    self.doing = Doing::Moving(passed.map_err(|error| failed("launching a transfer", error))?);
                }
                Ok(false)
            }
            Doing::Moving(passed) => {
                // A side that died is heard of here, as the transfer itself would wait for ever.
                self.is_called("moving a body")?;
                #[allow(unsafe_code, reason = "the driver's raw event")]
                // SAFETY: the event lives as long as `passed`, which is not dropped before.
                match unsafe { event::query(passed.cu_event()) } {
                    Ok(()) => {
                        self.doing = Doing::Nothing;
                        Ok(true)
                    }
                    Err(DriverError(cudaError_enum::CUDA_ERROR_NOT_READY)) => Ok(false),
                    Err(error) => Err(failed("moving a body", error)),
                }
            }
            Doing::Leaving => {
                if !self.is_called("taking leave")? {
                    return Ok(false);
                }
                let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
                self.doing = Doing::Nothing;
                #[allow(unsafe_code, reason = "the library's C interface")]
                // SAFETY: the communicator is alive and nothing is under way; nobody has it from here on.
                let destroyed = unsafe { result::comm_destroy(raw) };
                destroyed.map(|_| true).map_err(|error| failed("taking leave", named(&error)))
            }
        }
    }

    fn received(&mut self) -> Result<Vec<u8>, BodyError> {
        let buffer = self.buffer.take().ok_or_else(|| failed("receiving", "nothing was received"))?;
        let body = self.stream.clone_dtoh(&buffer).map_err(|error| failed("receiving", error))?;
        self.stream.synchronize().map_err(|error| failed("receiving", error))?;
        Ok(body)
    }

    fn begin_leave(&mut self) -> Result<(), BodyError> {
        const DOING: &str = "taking leave";
        self.is_alive(DOING)?;
        self.doing = Doing::Leaving;
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: the communicator is alive.
        let begun = unsafe { result::comm_finalize(self.raw) };
        begun.map(drop).map_err(|error| self.failed(DOING, &error))
    }

    fn abort(&mut self) {
        let raw = std::mem::replace(&mut self.raw, std::ptr::null_mut());
        self.doing = Doing::Nothing;
        if raw.is_null() {
            return;
        }
        #[allow(unsafe_code, reason = "the library's C interface")]
        // SAFETY: the communicator is alive, and nobody has it from here on.
        if let Err(error) = unsafe { result::comm_abort(raw) } {
            tracing::warn!(error = named(&error), "a pair of GPUs was not ended well");
        }
    }
}

impl Drop for Pair {
    /// Before its buffer goes, into which the library may still write.
    fn drop(&mut self) {
        self.abort();
    }
}
