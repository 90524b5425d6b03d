//! What a coordinator shows over HTTP: probes, numbers, and the page with the data behind it. Only looked at, never told
//! anything; who may look is the gate's to say.

mod follow;

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use espalier_common::clock::unix_millis;
use espalier_common::metric;
use espalier_gate::web::{Readiness, probes};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::events::{EventLog, RunEvent, Status, WorkerStatus};
use crate::fleet::Roster;
use crate::metrics::{CoordinatorMetrics, Now};
use crate::page;
use crate::view::{Cursor, State as RunState, Update};

/// Browsers that may follow at a time.
pub(crate) const FOLLOWERS: usize = 64;

/// A loop that has been at one event for longer is stuck: the longest is a record that a store takes a minute to accept.
const STUCK_MILLIS: u64 = 180_000;

/// What is looked at: the desk of a coordinator, or the one run of a process.
pub trait Watched: Send + Sync {
    /// Its runs and workers.
    fn status(&self) -> Status;
    /// A run by the name that the status gives it.
    fn events(&self, run: &str) -> Option<EventLog>;
}

/// The run of a process that has but one.
pub struct OnlyRun {
    /// Its events.
    pub events: EventLog,
    /// Its workers.
    pub roster: Roster,
}

impl OnlyRun {
    /// What it is called.
    const NAME: &str = "this";
}

impl Watched for OnlyRun {
    fn status(&self) -> Status {
        let run = self.events.look(|view| view.status(Self::NAME, ""));
        Status { runs: vec![run], workers: workers(&self.roster) }
    }

    fn events(&self, run: &str) -> Option<EventLog> {
        (run == Self::NAME).then(|| self.events.clone())
    }
}

/// The workers that are there.
pub(crate) fn workers(roster: &Roster) -> Vec<WorkerStatus> {
    let status = |(worker, member): (_, crate::fleet::Member)| WorkerStatus {
        worker,
        offer: member.offer,
        peak_rss_bytes: member.peak_rss_bytes,
        bytes_received: member.bytes_received,
    };
    roster.members().into_iter().map(status).collect()
}

/// What all pages know.
#[derive(Clone)]
pub struct Pages {
    watched: Arc<OnceLock<Arc<dyn Watched>>>,
    roster: Roster,
    metrics: CoordinatorMetrics,
    readiness: Readiness,
    followers: Arc<Semaphore>,
    stop: CancellationToken,
}

impl Pages {
    /// Pages of a program that has nothing to show yet. Those who follow are let go once `stop` is set.
    pub fn new(roster: Roster, metrics: CoordinatorMetrics, readiness: Readiness, stop: CancellationToken) -> Self {
        let followers = Arc::new(Semaphore::new(FOLLOWERS));
        Self { watched: Arc::default(), roster, metrics, readiness, followers, stop }
    }

    /// Says what there is to look at; the first time counts.
    pub fn show(&self, watched: Arc<dyn Watched>) {
        let _ = self.watched.set(watched);
    }

    /// The routes.
    pub fn router(&self) -> Router {
        let pages = self.clone();
        let data = Router::new()
            .route("/", get(page))
            .route("/metrics", get(metrics))
            .route("/api/state", get(state))
            .route("/api/events", get(follow::events))
            .route("/api/report", get(report))
            .route("/report", get(frozen))
            .with_state(self.clone());
        data.merge(probes(self.readiness.clone(), move || pages.alive()))
    }

    fn watched(&self) -> Result<&Arc<dyn Watched>, StatusCode> {
        self.watched.get().ok_or(StatusCode::SERVICE_UNAVAILABLE)
    }

    fn logs(&self) -> Vec<(String, EventLog)> {
        let Some(watched) = self.watched.get() else { return Vec::new() };
        let runs = watched.status().runs.into_iter().map(|run| run.run.0);
        runs.filter_map(|run| watched.events(&run).map(|log| (run, log))).collect()
    }

    fn busy_millis(&self) -> u64 {
        self.logs().iter().map(|(_, log)| log.busy_millis()).max().unwrap_or(0)
    }

    /// Whether no run's loop hangs.
    fn alive(&self) -> Result<(), String> {
        match self.busy_millis() {
            busy if busy > STUCK_MILLIS => {
                Err(format!("the loop of a run has been at one event for {} s", busy / 1000))
            }
            _ => Ok(()),
        }
    }

    fn now(&self) -> Now {
        let mut now = Now {
            ready: self.readiness.get().is_ok(),
            followers: FOLLOWERS - self.followers.available_permits(),
            busy_seconds: self.busy_millis() as f64 / 1000.0,
            bytes_received: self.roster.everyone().values().map(|member| member.bytes_received).sum(),
            ..Now::default()
        };
        let mut busy = std::collections::BTreeSet::new();
        for (name, log) in self.logs() {
            log.look(|view| {
                let head = view.head();
                now.runs.push(head.state);
                now.units.extend(view.leased());
                busy.extend(view.open().iter().map(|span| span.worker));
                if head.state == RunState::Running {
                    let left = head.eta.map(|eta| eta.saturating_sub(unix_millis()) as f64 / 1000.0);
                    now.going.push((name, head.committed, head.layers, left));
                }
            });
        }
        let here = self.roster.members();
        let at_work = here.keys().filter(|worker| busy.contains(worker)).count();
        now.workers = (at_work, here.len() - at_work);
        now
    }
}

/// Everything about runs and workers that fits in a list.
#[derive(Debug, Serialize)]
pub(crate) struct Fleet {
    version: &'static str,
    #[serde(flatten)]
    status: Status,
}

impl Fleet {
    pub(crate) fn of(watched: &dyn Watched) -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), status: watched.status() }
    }
}

/// `?run=`
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Which {
    run: Option<String>,
}

fn json_response(value: &impl Serialize) -> Response {
    let text = serde_json::to_string(value).expect("it is plain data");
    ([(CONTENT_TYPE, "application/json")], text).into_response()
}

async fn page() -> Response {
    let page = page::live();
    let html = (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let policy = HeaderValue::from_str(&page.policy).expect("a policy is visible ASCII");
    ([html, (CONTENT_SECURITY_POLICY, policy)], Body::from(page.html.clone())).into_response()
}

async fn metrics(State(pages): State<Pages>) -> Response {
    ([(CONTENT_TYPE, metric::CONTENT_TYPE)], pages.metrics.render(&pages.now())).into_response()
}

/// One run at one moment.
#[derive(Debug, Serialize)]
struct Snapshot {
    now: u64,
    fleet: Fleet,
    #[serde(skip_serializing_if = "Option::is_none")]
    run: Option<Update>,
}

async fn state(State(pages): State<Pages>, Query(which): Query<Which>) -> Result<Response, StatusCode> {
    let watched = pages.watched()?;
    let update = |run: &String| {
        let log = watched.events(run).ok_or(StatusCode::NOT_FOUND)?;
        Ok::<_, StatusCode>(log.update(&mut Cursor::default()))
    };
    let run = which.run.as_ref().map(update).transpose()?;
    Ok(json_response(&Snapshot { now: unix_millis(), fleet: Fleet::of(watched.as_ref()), run }))
}

fn finished(pages: &Pages, which: &Which) -> Result<(String, EventLog, Value), StatusCode> {
    let name = which.run.clone().ok_or(StatusCode::NOT_FOUND)?;
    let log = pages.watched()?.events(&name).ok_or(StatusCode::NOT_FOUND)?;
    let report = log.follow().0.into_iter().rev().find_map(|stamped| match stamped.event {
        RunEvent::Finished { report } => Some(json!(report)),
        _ => None,
    });
    Ok((name, log, report.ok_or(StatusCode::NOT_FOUND)?))
}

async fn report(State(pages): State<Pages>, Query(which): Query<Which>) -> Result<Response, StatusCode> {
    finished(&pages, &which).map(|(_, _, report)| json_response(&report))
}

/// The page frozen into a file.
async fn frozen(State(pages): State<Pages>, Query(which): Query<Which>) -> Result<Response, StatusCode> {
    let (name, log, _) = finished(&pages, &which)?;
    let html = page::frozen(&log.view());
    // Names of tickets are ours, and are letters, digits and dashes.
    let disposition = HeaderValue::from_str(&format!("attachment; filename=\"{name}-report.html\""));
    let disposition = disposition.map_err(|_| StatusCode::NOT_FOUND)?;
    let html_type = HeaderValue::from_static("text/html; charset=utf-8");
    let policy = HeaderValue::from_str(&page::live().policy).expect("a policy is visible ASCII");
    let headers = [(CONTENT_TYPE, html_type), (CONTENT_DISPOSITION, disposition), (CONTENT_SECURITY_POLICY, policy)];
    Ok((headers, html).into_response())
}
