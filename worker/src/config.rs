//! `worker.toml`: where a worker runs. What it computes is in the job.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;

use espalier_common::device::DeviceChoice;
use espalier_common::telemetry::LogConfig;
use espalier_gate::trace::Collector;
use espalier_gate::{AuthSection, GateError, HttpSection, TlsSection, TraceSection};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::crew::owner::LEAST_PATIENCE;

/// The worker's configuration.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// The worker itself.
    pub worker: WorkerSection,
    /// Its certificate, and whom it believes.
    pub tls: TlsSection,
    /// Tokens that stand in for a viewer's certificate; its services take none.
    pub auth: AuthSection,
    /// Where its probes and numbers are.
    pub http: HttpSection,
    /// Its logs.
    pub log: LogConfig,
    /// Where its spans go.
    pub trace: TraceSection,
}

impl WorkerConfig {
    /// How the collector of traces is reached, if one is named.
    ///
    /// # Errors
    /// See [`GateError`].
    pub fn collector(&self) -> Result<Option<Collector>, GateError> {
        self.trace.collector(&self.tls)
    }
}

/// `[worker]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerSection {
    /// URL of the coordinator, e.g. `https://coordinator:7433`; `http://` on loopback only.
    pub coordinator: Option<String>,
    /// Where the worker's own services listen; port 0 takes a free one. Beyond loopback only with `[tls]`.
    pub listen: SocketAddr,
    /// How others reach them: a host that the worker's certificate names, or host:port; the address of `listen` if none is
    /// given.
    pub advertise: Option<String>,
    /// A name for people; host and process if none is given.
    pub name: Option<String>,
    /// Compute threads; as many as the process may use if none is given.
    pub threads: Option<usize>,
    /// What computes: `auto` for a GPU if this build and machine have one and else the CPU, `cpu`, or `cuda:N`.
    pub device: DeviceChoice,
    /// Lets matrix products on a GPU round their factors to 10 bits of mantissa (TF32), which is faster and less exact. Workers
    /// that differ in it are not let into one cluster.
    pub tf32: bool,
    /// How far NCCL may carry what GPU workers send each other: `off`, `host` for GPUs of one machine, or `cluster`; where it does
    /// not reach, gRPC does. NCCL does not encrypt, and listens on the machine's network: if none is given it is `off` with
    /// `[tls]`, and else `host`.
    pub nccl: Option<NcclReach>,
    /// Whether workers of one machine and one user that share a layer send each other its tensors through memory (`/dev/shm`, 8 MB
    /// for each two) instead of a socket. A worker that may use NCCL offers that instead.
    pub shared_memory: bool,
    /// Bytes of hidden states kept on the GPU, the rest goes to memory; half of what is free there if none is given.
    pub device_budget: Option<u64>,
    /// Bytes of hidden states kept in memory, the rest goes to `scratch`; a quarter of the machine's memory, shared by
    /// `workers_here`, if none is given.
    pub memory_budget: Option<u64>,
    /// Workers on this machine, this one included.
    pub workers_here: NonZeroU32,
    /// Speed of f32 matrix products in GFLOP/s that the worker offers, by which layers are shared out until others have seen what
    /// it takes; measured at the start if none is given, which a busy machine makes less of than it is.
    pub gflops: Option<f64>,
    /// Folder for what does not fit; the system's temporary folder if none is given.
    pub scratch: Option<PathBuf>,
    /// An assistant with a layer of this worker's may take so many seconds, and besides four times as long as this worker would,
    /// before it is given up on for the rest of the layer.
    pub assistant_patience_seconds: NonZeroU32,
    /// A coordinator that cannot be reached for so many seconds is given up, and the worker ends with exit code 75; 30 at the
    /// start and 60 later if none is given. Longer where another machine has to be found for a coordinator that was lost.
    pub coordinator_silence_seconds: Option<NonZeroU32>,
}

impl WorkerSection {
    /// How far NCCL may carry tensors, where everything else is encrypted or nothing is.
    pub fn nccl_reach(&self, is_encrypted: bool) -> NcclReach {
        self.nccl.unwrap_or(if is_encrypted { NcclReach::Off } else { NcclReach::Host })
    }
}

/// How far NCCL may carry tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum NcclReach {
    /// Nowhere.
    Off,
    /// To workers on this machine.
    Host,
    /// To any worker that may too.
    Cluster,
}

/// An assistant's machine may have other things to do for a while, and it has a layer to load.
const PATIENCE_SECONDS: NonZeroU32 = NonZeroU32::new(LEAST_PATIENCE.as_secs() as u32).expect("it is not 0");

impl Default for WorkerSection {
    fn default() -> Self {
        Self {
            coordinator: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            name: None,
            threads: None,
            device: DeviceChoice::Auto,
            tf32: false,
            nccl: None,
            shared_memory: true,
            device_budget: None,
            memory_budget: None,
            workers_here: NonZeroU32::MIN,
            gflops: None,
            scratch: None,
            assistant_patience_seconds: PATIENCE_SECONDS,
            coordinator_silence_seconds: None,
        }
    }
}
