//! Server-sent events. Nothing is queued for anybody: whoever is slow gets less often what changed meanwhile, and whoever has
//! fallen behind what is kept gets the whole again.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use espalier_common::clock::unix_millis;
use futures::stream;
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{Fleet, Pages, Watched, Which};
use crate::events::EventLog;
use crate::view::Cursor;

/// How often a follower is told what changed.
const PACE: Duration = Duration::from_millis(500);
/// After so many times without news, a comment says that the connection lives.
const QUIET: u32 = 30;

/// One browser that follows.
struct Follower {
    watched: Arc<dyn Watched>,
    run: Option<String>,
    log: Option<EventLog>,
    cursor: Cursor,
    seen: u64,
    fleet: String,
    quiet: u32,
    pace: Interval,
    stop: CancellationToken,
    /// Its place among the followers.
    _permit: OwnedSemaphorePermit,
}

/// `/api/events?run=`: `fleet` whenever the lists change, `run` whenever the run does.
pub(crate) async fn events(State(pages): State<Pages>, Query(which): Query<Which>) -> Result<Response, StatusCode> {
    let watched = Arc::clone(pages.watched()?);
    if let Some(run) = &which.run {
        watched.events(run).ok_or(StatusCode::NOT_FOUND)?;
    }
    let permit = Arc::clone(&pages.followers).try_acquire_owned().map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let mut pace = tokio::time::interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let follower = Follower {
        watched,
        run: which.run,
        log: None,
        cursor: Cursor::default(),
        seen: 0,
        fleet: String::new(),
        quiet: 0,
        pace,
        stop: pages.stop.clone(),
        _permit: permit,
    };
    let frames = stream::unfold(follower, |mut follower| async move {
        let frame = follower.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(frame)), follower))
    });
    Ok(([(CONTENT_TYPE, "text/event-stream")], Body::from_stream(frames)).into_response())
}

impl Follower {
    /// What is to be sent next; `None` once the program ends. It is asked for only when the former has been taken.
    async fn next(&mut self) -> Option<String> {
        loop {
            tokio::select! {
                _ = self.pace.tick() => {}
                () = self.stop.cancelled() => return None,
            }
            let frame = self.frame();
            if !frame.is_empty() {
                self.quiet = 0;
                return Some(frame);
            }
            self.quiet += 1;
            if self.quiet >= QUIET {
                self.quiet = 0;
                return Some(": no news\n\n".to_owned());
            }
        }
    }

    fn frame(&mut self) -> String {
        let mut frame = String::new();
        let fleet = json!(Fleet::of(self.watched.as_ref())).to_string();
        if fleet != self.fleet {
            frame.push_str(&format!("event: fleet\ndata: {{\"now\":{},\"fleet\":{fleet}}}\n\n", unix_millis()));
            self.fleet = fleet;
        }
        let Some(log) = self.run.as_ref().and_then(|run| self.watched.events(run)) else { return frame };
        // A job that is submitted again begins a new log.
        if !self.log.as_ref().is_some_and(|known| known.is(&log)) {
            (self.cursor, self.seen) = (Cursor::default(), u64::MAX);
            self.log = Some(log.clone());
        }
        let count = *log.changes().borrow();
        if count != self.seen {
            self.seen = count;
            let data = json!({ "now": unix_millis(), "run": log.update(&mut self.cursor) });
            frame.push_str(&format!("event: run\ndata: {data}\n\n"));
        }
        frame
    }
}
