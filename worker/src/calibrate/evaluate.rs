//! How well a model predicts text: next-token losses, layer by layer over all windows.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use candle_core::Tensor;
use espalier_common::ids::LayerIndex;
use rayon::prelude::*;

use crate::model::fused::log_sum_exp;
use crate::model::{Decoder, DecoderLayer, Head, ModelError};

/// Tokens whose logits exist at one time for one window: vocabularies are large.
const HEAD_CHUNK: usize = 128;

/// The negative log-likelihood, in nats, of each window's tokens after the first, each given the ones before it: a sum over
/// `window.len() − 1` targets (0 for windows of fewer than two tokens).
///
/// Perplexity by the protocol of SparseGPT over n windows of length L is exp(Σ nll · L/(L−1) / (n·L)).
///
/// One layer at a time takes all windows a step further, in parallel, while the next one is being loaded. In memory are the
/// hidden states of all windows, two layers, then the head and the logits of [`HEAD_CHUNK`] tokens per thread. `progress`
/// is told `(done, total)` steps, from several threads; a step is one window through one layer or through the head. The
/// result has the same bits for any number of threads.
///
/// # Errors
/// `Cancelled` once `cancelled` is set; what the decoder says.
pub fn window_nll(
    decoder: &dyn Decoder,
    windows: &[&[u32]],
    cancelled: &AtomicBool,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Vec<f64>, ModelError> {
    let steps = Steps { cancelled, progress, done: AtomicUsize::new(0), total: windows.len() * (decoder.layers() + 1) };
    let mut hidden: Vec<Tensor> = windows.par_iter().map(|window| decoder.embed(window)).collect::<Result<_, _>>()?;
    let mut layers = (0..decoder.layers()).map(|index| LayerIndex(u32::try_from(index).unwrap_or(u32::MAX)));
    let mut next = layers.next().map(|index| decoder.load_layer(index)).transpose()?;
    while let Some(layer) = next.take() {
        next = thread::scope(|scope| {
            let loading = layers.next().map(|index| scope.spawn(move || decoder.load_layer(index)));
            let ran = run_layer(layer.as_ref(), &mut hidden, &steps);
            let loaded = loading.map(|loading| loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            ran.and_then(|()| loaded.transpose())
        })?;
    }
    let head = decoder.load_head()?;
    windows.par_iter().zip(hidden).map(|(window, hidden)| steps.take(|| nll(head.as_ref(), window, &hidden))).collect()
}

fn run_layer(layer: &dyn DecoderLayer, hidden: &mut [Tensor], steps: &Steps<'_>) -> Result<(), ModelError> {
    hidden.par_iter_mut().try_for_each(|hidden| {
        *hidden = steps.take(|| layer.forward(hidden))?;
        Ok(())
    })
}

/// The loss of one window whose last hidden states are `hidden` `[tokens, hidden]`.
fn nll(head: &dyn Head, window: &[u32], hidden: &Tensor) -> Result<f64, ModelError> {
    let targets = window.get(1..).unwrap_or_default();
    let mut sum = 0.0;
    for (chunk, targets) in targets.chunks(HEAD_CHUNK).enumerate() {
        let logits = head.logits(&hidden.narrow(0, chunk * HEAD_CHUNK, targets.len())?)?;
        let vocabulary = logits.dim(1)?;
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
            sum += log_sum_exp(row) - f64::from(row[target as usize]);
        }
    }
    Ok(sum)
}

/// Counts what is done, and stops when told to.
struct Steps<'a> {
    cancelled: &'a AtomicBool,
    progress: &'a (dyn Fn(usize, usize) + Sync),
    done: AtomicUsize,
    total: usize,
}

impl Steps<'_> {
    fn take<T>(&self, step: impl FnOnce() -> Result<T, ModelError>) -> Result<T, ModelError> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(ModelError::Cancelled);
        }
        let result = step()?;
        (self.progress)(self.done.fetch_add(1, Ordering::Relaxed) + 1, self.total);
        Ok(result)
    }
}
