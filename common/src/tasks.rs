//! Structured concurrency: the one place that may call `tokio::spawn`.

use std::future::Future;
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::runtime::{Handle, Runtime, RuntimeFlavor};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks that live no longer than their parent lets them: cancel, then join by a deadline.
#[derive(Debug, Clone, Default)]
pub struct TaskGroup {
    tracker: TaskTracker,
    token: CancellationToken,
}

impl TaskGroup {
    /// A group of its own.
    pub fn new() -> Self {
        Self::default()
    }

    /// A group that is cancelled with this one (but joined on its own).
    #[must_use]
    pub fn child(&self) -> Self {
        Self { tracker: TaskTracker::new(), token: self.token.child_token() }
    }

    /// Every wait inside a task selects on this.
    pub fn token(&self) -> CancellationToken {
        self.token.clone()
    }

    /// Starts a task of the group.
    #[allow(clippy::disallowed_methods, reason = "this is the place")]
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn(future);
    }

    /// Starts a blocking task of the group, on its own thread.
    pub fn spawn_blocking(&self, work: impl FnOnce() + Send + 'static) {
        self.tracker.spawn_blocking(work);
    }

    /// Cancels every task and waits for them, at most `deadline`. Returns whether all ended in time.
    pub async fn shut_down(&self, deadline: Duration) -> bool {
        self.token.cancel();
        self.tracker.close();
        tokio::time::timeout(deadline, self.tracker.wait()).await.is_ok()
    }
}

/// A runtime of its own on which blocking code lets futures run: it waits for them wherever it is itself, on a plain thread or
/// on one of another runtime, and can never wait for a thread that it occupies.
#[derive(Debug)]
pub struct Background {
    runtime: Runtime,
}

/// Enough to keep several transfers going: they wait, hash and copy.
const BACKGROUND_THREADS: usize = 2;

impl Background {
    /// The one of this process, started when it is first asked for. It ends with the process.
    ///
    /// # Errors
    /// What the system says if it gives no threads.
    pub fn shared() -> std::io::Result<&'static Self> {
        static SHARED: Mutex<Option<&'static Background>> = Mutex::new(None);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(background) = *shared {
            return Ok(background);
        }
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(BACKGROUND_THREADS).thread_name("background").enable_all();
        let background: &'static Self = Box::leak(Box::new(Self { runtime: builder.build()? }));
        *shared = Some(background);
        Ok(background)
    }

    /// Starts a future.
    #[allow(clippy::disallowed_methods, reason = "this is the place")]
    pub fn start<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> Pending<T> {
        let (done, result) = mpsc::sync_channel(1);
        self.runtime.spawn(async move {
            // Nobody may be waiting any more.
            let _ = done.send(future.await);
        });
        Pending { result }
    }

    /// Runs a future to its end.
    pub fn finish<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        self.start(future).wait()
    }
}

/// What a started future will give.
#[derive(Debug)]
pub struct Pending<T> {
    result: mpsc::Receiver<T>,
}

impl<T> Pending<T> {
    /// Waits for it. On a thread of a runtime, the runtime's other tasks are moved to another thread first.
    ///
    /// # Panics
    /// If the future did.
    pub fn wait(self) -> T {
        let wait = || self.result.recv().expect("a future that does not panic ends");
        match Handle::try_current().map(|handle| handle.runtime_flavor()) {
            Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(wait),
            _ => wait(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_in_the_background_stops_nobody() {
        let two = || Background::shared().unwrap().finish(async { 1 + 1 });
        assert_eq!(two(), 2);
        let single = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert_eq!(single.block_on(async { two() }), 2);
        // One thread, and a task that blocks it for another one of the same runtime: that one must be moved.
        let multi = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (send, receive) = tokio::sync::oneshot::channel();
        let group = TaskGroup::new();
        multi.block_on(async {
            let (inner, started) = (group.clone(), tokio::sync::oneshot::channel());
            group.spawn(async move {
                inner.spawn(async move { send.send(7).unwrap() });
                let seven = Background::shared().unwrap().finish(async { receive.await.unwrap() });
                started.0.send(seven).unwrap();
            });
            assert_eq!(started.1.await.unwrap(), 7);
        });
    }
}
