//! `status --watch`: a run, or a coordinator, redrawn in a terminal; plain lines where standard output is none.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use espalier_common::clock::unix_millis;
use espalier_common::config;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::args::RemoteArgs;
use super::cluster::{connect, failed, tables};
use super::{CliError, local, screen, terminal};
use crate::error::{RunError, exit};
use crate::events::{RunEvent, Stamped};
use crate::journal;
use crate::view::{Cursor, RunView, State, journal as told};

/// How often what is asked for is asked for again, and clocks move on.
const PACE: Duration = Duration::from_secs(1);

/// Where it is drawn.
enum Canvas {
    /// Over what was drawn before.
    Terminal(ProgressBar),
    /// What is new, a line at a time.
    Lines(Cursor),
    /// Events as they come, one JSON document a line.
    Json,
}

impl Canvas {
    fn new(json: bool) -> Self {
        if json {
            return Self::Json;
        }
        if !std::io::stdout().is_terminal() {
            return Self::Lines(Cursor::default());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout());
        bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
        Self::Terminal(bar)
    }

    fn draw(&mut self, view: &RunView) {
        match self {
            Self::Terminal(bar) => bar.set_message(terminal::run(view, unix_millis())),
            Self::Lines(cursor) => view.since(cursor).log.items.iter().for_each(|line| screen::out(&line.text)),
            Self::Json => {}
        }
    }

    fn take(&self, stamped: &Stamped) {
        if matches!(self, Self::Json) {
            screen::out(&json!(stamped).to_string());
        }
    }

    /// Leaves the last picture where it is, for what follows is no picture.
    fn finish(self, view: &RunView) {
        if let Self::Terminal(bar) = self {
            bar.finish_and_clear();
            screen::out(&terminal::run(view, unix_millis()));
        }
    }
}

/// Watches a run to its end, or a coordinator until somebody interrupts this.
pub(crate) async fn run(run: Option<String>, remote: RemoteArgs, json: bool) -> Result<(), CliError> {
    let stop = local::stop_on_signal();
    match run {
        None => overview(&remote, json, &stop).await,
        Some(run) if run.contains('/') || Path::new(&run).is_dir() => kept(&run, json, &stop).await,
        Some(run) => served(&run, &remote, json, &stop).await,
    }
}

/// How a run that is over ends the command.
fn outcome(view: &RunView) -> Result<(), CliError> {
    let head = view.head();
    match (head.state, head.exit_code) {
        (State::Failed, code) => {
            let message = head.reason.clone().unwrap_or_else(|| "the run ended".to_owned());
            Err(CliError { message, code: code.unwrap_or(exit::INTERRUPTED) })
        }
        _ => Ok(()),
    }
}

fn let_go(run: &str) -> CliError {
    CliError { message: format!("no longer following {run}, which goes on"), code: exit::INTERRUPTED }
}

/// A run of a coordinator.
async fn served(run: &str, remote: &RemoteArgs, json: bool, stop: &CancellationToken) -> Result<(), CliError> {
    let mut client = connect(&remote.coordinator, &remote.access).await?;
    let mut events = client.watch(run).await.map_err(|error| failed(&error))?;
    let (mut canvas, mut view) = (Canvas::new(json), RunView::default());
    let mut clock = tokio::time::interval(PACE);
    loop {
        tokio::select! {
            event = events.next() => {
                let Some(stamped) = event.map_err(|error| failed(&error))? else {
                    let message = format!("the coordinator at {} ended before {run} did", remote.coordinator);
                    return Err(CliError { message, code: exit::INTERRUPTED });
                };
                view.apply(stamped.at, &stamped.event);
                canvas.take(&stamped);
                canvas.draw(&view);
                if stamped.is_last() {
                    canvas.finish(&view);
                    return outcome(&view);
                }
            }
            _ = clock.tick() => canvas.draw(&view),
            () = stop.cancelled() => {
                canvas.finish(&view);
                return Err(let_go(run));
            }
        }
    }
}

/// A run by its journal, whoever writes that.
async fn kept(run_url: &str, json: bool, stop: &CancellationToken) -> Result<(), CliError> {
    let store = config::open_store(run_url).map_err(RunError::from)?;
    let (mut canvas, mut view, mut seen) = (Canvas::new(json), RunView::default(), 0);
    let mut clock = tokio::time::interval(PACE);
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            () = stop.cancelled() => {
                canvas.finish(&view);
                return Err(let_go(run_url));
            }
        }
        let records = journal::read_run(store.as_ref()).map_err(RunError::from)?;
        for event in told::events(&records, seen, run_url) {
            let stamped = Stamped { at: unix_millis(), event };
            if let RunEvent::Started { worker, .. } = &stamped.event {
                view.greet(*worker);
            }
            view.apply(stamped.at, &stamped.event);
            canvas.take(&stamped);
        }
        seen = records.len();
        canvas.draw(&view);
        if matches!(view.head().state, State::Done | State::Failed) {
            canvas.finish(&view);
            return outcome(&view);
        }
    }
}

/// A coordinator's runs and workers.
async fn overview(remote: &RemoteArgs, json: bool, stop: &CancellationToken) -> Result<(), CliError> {
    let mut client = connect(&remote.coordinator, &remote.access).await?;
    let canvas = Canvas::new(json);
    let mut clock = tokio::time::interval(PACE);
    let mut last = String::new();
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            () = stop.cancelled() => {
                if let Canvas::Terminal(bar) = canvas {
                    bar.finish_and_clear();
                    screen::out(&last);
                }
                return Ok(());
            }
        }
        let (status, document) = client.status().await.map_err(|error| failed(&error))?;
        let text = if json { document } else { tables(&status) };
        if text == last {
            continue;
        }
        match &canvas {
            Canvas::Terminal(bar) => bar.set_message(text.clone()),
            Canvas::Lines(_) | Canvas::Json => screen::out(&text),
        }
        last = text;
    }
}
