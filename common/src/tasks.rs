//! Structured concurrency: the one place that may call `tokio::spawn`.

use std::future::Future;
use std::time::Duration;

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
