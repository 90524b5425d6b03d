//! Being a member of the coordinator's fleet: registering, beating, reporting, leaving.
//!
//! Nothing here computes, so a heartbeat is late only when the network is.

mod client;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use espalier_common::clock::unix_millis;
use espalier_common::wire::lease_to_wire;
use espalier_proto::v1 as pb;
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::device::memory::peak_rss_bytes;
use crate::session::{Session, UnitReport};

pub use client::{CallError, CoordinatorClient};

/// A coordinator that is only just starting is there within so long, and nobody need be told.
const UNTOLD: Duration = Duration::from_secs(2);
/// A coordinator that cannot be registered with for so long at the start is taken for absent.
const REGISTRATION: Duration = Duration::from_secs(30);

/// A loop that has not turned for so long hangs: a call ends within 10 s, a wait within 60 s.
const STUCK: Duration = Duration::from_secs(120);

/// A coordinator that has not answered for so long is taken for gone.
const UNREACHABLE: Duration = Duration::from_secs(60);

/// This worker's place in the fleet.
#[derive(Debug)]
pub struct Membership {
    client: CoordinatorClient,
    session: Arc<Session>,
    offer: pb::RegisterRequest,
    /// The id that the coordinator gave; reports carry the lease's own.
    worker: AtomicU64,
    /// The coordinator's life in which it was given.
    coordinator: AtomicU64,
    /// When the loop last turned, in milliseconds since 1970.
    turned: AtomicU64,
    /// How long the coordinator may be silent, if somebody has said.
    silence: Option<Duration>,
}

impl Membership {
    /// A place that is not taken yet. `silence` is how long the coordinator may be absent or silent before it is given up, if
    /// not as long as is usual.
    pub fn new(
        client: CoordinatorClient,
        session: Arc<Session>,
        offer: pb::RegisterRequest,
        silence: Option<Duration>,
    ) -> Self {
        let (worker, coordinator, turned) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(unix_millis()));
        Self { client, session, offer, worker, coordinator, turned, silence }
    }

    /// Whether the loop that registers and beats still turns.
    ///
    /// # Errors
    /// For how long it has not.
    pub fn alive(&self) -> Result<(), String> {
        let still = unix_millis().saturating_sub(self.turned.load(Ordering::Relaxed));
        if still > STUCK.as_millis() as u64 { Err(format!("no heartbeat for {} s", still / 1000)) } else { Ok(()) }
    }

    fn turn(&self) {
        self.turned.store(unix_millis(), Ordering::Relaxed);
    }

    /// Registers, then beats and reports until the coordinator says that nothing is left to do.
    ///
    /// # Errors
    /// `Refused` or `Unfit` if the coordinator will not have this worker, `Unreachable` once it has been silent for too long.
    pub async fn run(&self, reports: mpsc::Receiver<UnitReport>) -> Result<(), CallError> {
        let interval = self.register(self.silence.unwrap_or(REGISTRATION)).await?;
        tokio::select! {
            ended = self.beat(interval) => ended,
            ended = self.deliver(reports) => ended,
        }
    }

    /// Tells the coordinator that this worker leaves; what it held is lost.
    pub async fn leave(&self, patience: Duration) {
        let worker = self.worker.load(Ordering::Relaxed);
        let coordinator = self.coordinator.load(Ordering::Relaxed);
        let leaving = tokio::time::timeout(patience, self.client.leave(worker, coordinator));
        if worker != 0 && !matches!(leaving.await, Ok(Ok(()))) {
            tracing::warn!(coordinator = self.client.url(), "the coordinator was not told that this worker leaves");
        }
    }

    /// Registers within `patience`; returns the interval of heartbeats.
    async fn register(&self, patience: Duration) -> Result<Duration, CallError> {
        let deadline = Instant::now() + patience;
        let mut backoff = Backoff::default();
        let (began, mut is_told) = (Instant::now(), false);
        self.session.readiness().set(Err("it is not registered"));
        loop {
            self.turn();
            match self.client.register(self.offer.clone()).await {
                Ok(answer) => {
                    self.session.readiness().set(Ok(()));
                    self.worker.store(answer.worker, Ordering::Relaxed);
                    self.coordinator.store(answer.coordinator, Ordering::Relaxed);
                    tracing::info!(worker = answer.worker, coordinator = self.client.url(), "registered");
                    return Ok(Duration::from_millis(u64::from(answer.heartbeat_interval_ms.clamp(10, 60_000))));
                }
                Err(error) if self.may_register_again(&error) && Instant::now() < deadline => {
                    if is_told || began.elapsed() < UNTOLD {
                        tracing::debug!(%error, "registering again");
                    } else {
                        is_told = true;
                        tracing::warn!(%error, patience_seconds = patience.as_secs(), "cannot register yet: trying again");
                    }
                    tokio::time::sleep(backoff.next()).await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A coordinator that never believed this worker, or that this worker never believed, will not do so now.
    fn may_register_again(&self, error: &CallError) -> bool {
        let was_registered = self.worker.load(Ordering::Relaxed) != 0;
        matches!(error, CallError::Unreachable { .. }) || (was_registered && error.may_pass())
    }

    async fn beat(&self, mut interval: Duration) -> Result<(), CallError> {
        let silence = self.silence.unwrap_or(UNREACHABLE);
        let mut heard = Instant::now();
        // A worker that the coordinator cannot use is forgotten as soon as it is known: it waits longer each time.
        let (mut forgotten, mut next_try) = (Backoff::default(), Instant::now());
        loop {
            tokio::time::sleep(interval).await;
            self.turn();
            match self.client.heartbeat(self.heartbeat()).await {
                Ok(pb::HeartbeatResponse { dismissed: true, .. }) => {
                    tracing::info!("dismissed: nothing is left to do");
                    return Ok(());
                }
                Ok(pb::HeartbeatResponse { known, .. }) => {
                    heard = Instant::now();
                    if known {
                        (forgotten, next_try) = (Backoff::default(), heard);
                        self.session.readiness().set(Ok(()));
                        continue;
                    }
                    self.session.abandon_all();
                    self.session.readiness().set(Err("it is not registered"));
                    if next_try <= heard {
                        tracing::warn!("the coordinator does not know this worker: registering again");
                        interval = self.register(silence).await?;
                        next_try = Instant::now() + forgotten.next();
                    }
                }
                Err(error) if error.may_pass() && heard.elapsed() < silence => {
                    tracing::warn!(%error, "missed a heartbeat");
                    self.session.metrics().observe_missed_heartbeat();
                    self.session.readiness().set(Err("the coordinator does not answer"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn heartbeat(&self) -> pb::HeartbeatRequest {
        let progress = self.session.progress().into_iter().map(|(run, lease, progress)| pb::Progress {
            lease: Some(lease_to_wire(&run, lease)),
            phase: progress.phase.to_owned(),
            done: progress.done,
            total: progress.total,
        });
        pb::HeartbeatRequest {
            worker: self.worker.load(Ordering::Relaxed),
            coordinator: self.coordinator.load(Ordering::Relaxed),
            progress: progress.collect(),
            peak_rss_bytes: peak_rss_bytes(),
            bytes_received: self.session.bytes_received(),
        }
    }

    /// Delivers the ends of units, each until it is accepted; the heartbeat knows when to give up.
    async fn deliver(&self, mut reports: mpsc::Receiver<UnitReport>) -> Result<(), CallError> {
        while let Some(report) = reports.recv().await {
            let lease = report.lease;
            let message = self.report(report);
            let mut backoff = Backoff::default();
            loop {
                match self.client.report(message.clone()).await {
                    Ok(()) => break,
                    Err(error) if error.may_pass() => {
                        tracing::warn!(%lease, %error, "reporting again");
                        tokio::time::sleep(backoff.next()).await;
                    }
                    Err(error) => {
                        tracing::error!(%lease, %error, "report was refused");
                        break;
                    }
                }
            }
        }
        // The session keeps a sender for as long as this value lives.
        std::future::pending().await
    }

    fn report(&self, report: UnitReport) -> pb::ReportRequest {
        let outcome = match report.result {
            Ok(outcome) => outcome.into(),
            Err(fault) => pb::report_request::Outcome::Fault(fault.into()),
        };
        pb::ReportRequest {
            lease: Some(lease_to_wire(&report.run, report.lease)),
            outcome: Some(outcome),
            held: report.held.iter().map(|boundary| boundary.0).collect(),
            peak_rss_bytes: peak_rss_bytes(),
            bytes_received: self.session.bytes_received(),
        }
    }
}

/// Waits that double up to a bound, with jitter so that a fleet does not call in step.
#[derive(Debug, Clone, Copy, Default)]
struct Backoff {
    failures: u32,
}

impl Backoff {
    fn next(&mut self) -> Duration {
        const FIRST: Duration = Duration::from_millis(100);
        const LONGEST: Duration = Duration::from_secs(5);
        let wait = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        wait.mul_f64(rand::rng().random_range(0.5..1.0))
    }
}
