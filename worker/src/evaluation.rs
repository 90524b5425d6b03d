//! One share of the evaluation windows.

use candle_core::Device;
use espalier_common::clock::Stopwatch;
use espalier_common::config;
use espalier_common::report::{Artifact, Outcome};

use crate::calibrate::evaluate::window_nll;
use crate::run::{open_model, read_tokens};
use crate::unit::{Phases, TaskError, UnitControl};

/// What to evaluate on what.
#[derive(Debug, Clone)]
pub struct Evaluation {
    /// URI of the model.
    pub model: String,
    /// The windows: a token block.
    pub tokens: Artifact,
    /// Store of the token block.
    pub run_url: String,
    /// The windows of the block that are asked for.
    pub windows: Vec<u32>,
}

/// Evaluates the asked windows, in order.
///
/// # Errors
/// See [`TaskError`].
pub fn evaluate(work: &Evaluation, device: &Device, control: &UnitControl) -> Result<Outcome, TaskError> {
    let mut phases = Phases::of(control);
    let block = read_tokens(&*config::open_store(&work.run_url)?, &work.tokens)?;
    let model = phases.time("load", || open_model(&work.model, device))?;
    let windows = work
        .windows
        .iter()
        .map(|&window| {
            let outside =
                || TaskError::WindowOutOfRange { window, windows: block.sequences(), name: work.tokens.name.clone() };
            ((window as usize) < block.sequences()).then(|| block.sequence(window as usize)).ok_or_else(outside)
        })
        .collect::<Result<Vec<_>, TaskError>>()?;
    let watch = Stopwatch::start();
    let progress = |done, total| control.set_progress("evaluate", done, total);
    let window_nll = window_nll(&*model.decoder, &windows, control.cancelled(), &progress)?;
    phases.add("evaluate", watch.seconds(), 0.0);
    Ok(Outcome::Evaluated { window_nll, phases: phases.finish() })
}
