//! One thread owns the device and takes jobs one after another, so that compute never starves the runtime that answers RPCs.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};

use candle_core::Device;

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
    /// Too many jobs wait already.
    #[error("{QUEUE} units of work are waiting already")]
    Busy,
    /// The thread is gone.
    #[error("the device thread has ended")]
    Ended,
}

/// The thread that owns the device.
#[derive(Debug, Clone)]
pub struct DeviceThread {
    queue: SyncSender<Job>,
}

impl DeviceThread {
    /// Starts the thread. It ends when the last handle is dropped and its queue is empty.
    ///
    /// # Errors
    /// `Start`.
    pub fn start() -> Result<Self, DeviceError> {
        let (queue, jobs) = sync_channel::<Job>(QUEUE);
        let work = move || {
            let device = Device::Cpu;
            for job in jobs {
                job(&device);
            }
        };
        std::thread::Builder::new().name("device".to_owned()).spawn(work).map_err(DeviceError::Start)?;
        Ok(Self { queue })
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
        let device = DeviceThread::start().unwrap();
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
