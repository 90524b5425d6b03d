//! One thread owns the device and takes jobs one after another, so that compute never starves the runtime that answers RPCs.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use candle_core::Device;
use espalier_common::device::DeviceChoice;
use espalier_common::fault::FaultClass;

/// What the device thread is asked to do.
pub type Job = Box<dyn FnOnce(&Device) + Send>;

/// Jobs that may wait: the coordinator leases a worker one unit at a time, or a superseded one with its successor.
const QUEUE: usize = 8;

/// Why the device takes no job.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The system gave no thread.
    #[error("cannot start the device thread")]
    Start(#[source] std::io::Error),
    /// The thread pool cannot be made.
    #[error("cannot start {threads} compute threads")]
    Pool {
        /// Threads asked for.
        threads: usize,
        /// What the pool said.
        #[source]
        source: rayon::ThreadPoolBuildError,
    },
    /// A GPU was asked for, and this build or machine has none.
    #[error("worker.device is {choice}, which cannot be had: {reason}")]
    Absent {
        /// What was asked for.
        choice: DeviceChoice,
        /// Why there is none.
        reason: String,
    },
    /// A GPU was asked for that is not among those there are.
    #[error("worker.device is cuda:{number}, but this machine has {gpus} GPUs, counted from 0")]
    NoSuchGpu {
        /// Its number.
        number: usize,
        /// How many there are.
        gpus: usize,
    },
    /// Rounding for a GPU was asked for, and none is used.
    #[error("worker.tf32 is for GPUs, but the worker computes on the CPU: {reason}")]
    Tf32 {
        /// Why it does.
        reason: String,
    },
    /// Other machines shall be reached by NCCL, and this worker has none.
    #[error("worker.nccl is for GPUs, and this worker cannot use it: {reason}")]
    Nccl {
        /// Why it cannot.
        reason: String,
    },
    /// The GPU is there, and cannot be opened.
    #[error("cuda:{number} cannot be opened")]
    Open {
        /// Its number.
        number: usize,
        /// What the driver said.
        #[source]
        source: candle_core::Error,
    },
    /// Too many jobs wait already.
    #[error("{QUEUE} units of work are waiting already")]
    Busy,
    /// The thread is gone.
    #[error("the device thread has ended")]
    Ended,
}

impl DeviceError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Absent { .. } | Self::NoSuchGpu { .. } | Self::Tf32 { .. } | Self::Nccl { .. } => FaultClass::Reject,
            Self::Busy => FaultClass::RetryHere,
            Self::Start(_) | Self::Pool { .. } | Self::Open { .. } | Self::Ended => FaultClass::RetryElsewhere,
        }
    }
}

/// The thread that owns the device.
#[derive(Debug, Clone)]
pub struct DeviceThread {
    device: Device,
    queue: SyncSender<Job>,
}

impl DeviceThread {
    /// Starts the thread of a device. It ends when the last handle is dropped and its queue is empty.
    ///
    /// # Errors
    /// `Start`.
    pub fn start(device: Device) -> Result<Self, DeviceError> {
        let (queue, jobs) = sync_channel::<Job>(QUEUE);
        let owned = device.clone();
        let work = move || {
            for job in jobs {
                job(&owned);
            }
        };
        std::thread::Builder::new().name("device".to_owned()).spawn(work).map_err(DeviceError::Start)?;
        Ok(Self { device, queue })
    }

    /// The device, to say where tensors are to be; the thread alone computes on it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Queues a job, without waiting.
    ///
    /// # Errors
    /// `Busy`, `Ended`.
    pub fn submit(&self, job: Job) -> Result<(), DeviceError> {
        self.queue.try_send(job).map_err(|error| match error {
            TrySendError::Full(_) => DeviceError::Busy,
            TrySendError::Disconnected(_) => DeviceError::Ended,
        })
    }
}

/// Sizes the pool that all compute runs in, once in a process and before anything computes.
///
/// # Errors
/// `Pool`, also when there is a pool already.
pub fn build_compute_pool(threads: usize) -> Result<(), DeviceError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|index| format!("compute-{index}"))
        .build_global()
        .map_err(|source| DeviceError::Pool { threads, source })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn jobs_run_in_order_and_a_full_queue_is_told() {
        let device = DeviceThread::start(Device::Cpu).unwrap();
        let (release, gate) = channel::<()>();
        let (started, first) = channel();
        let (done, results) = channel();
        let held = Box::new(move |_: &Device| {
            started.send(()).unwrap();
            gate.recv().unwrap();
        });
        device.submit(held).unwrap();
        first.recv().unwrap();
        for index in 0..QUEUE {
            let done = done.clone();
            device.submit(Box::new(move |_| done.send(index).unwrap())).unwrap();
        }
        assert!(matches!(device.submit(Box::new(|_| {})), Err(DeviceError::Busy)));
        release.send(()).unwrap();
        drop(done);
        assert_eq!(results.iter().collect::<Vec<_>>(), (0..QUEUE).collect::<Vec<_>>());
    }
}
