//! How well a model predicts text: next-token losses, layer by layer over all windows.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use candle_core::{DType, Device, Tensor};
use espalier_common::ids::LayerIndex;

use crate::device::in_order;
use crate::model::fused::log_sum_exp;
use crate::model::{Decoder, DecoderLayer, Head, ModelError};

/// Tokens whose logits exist at one time for one window: vocabularies are large.
const HEAD_CHUNK: usize = 128;

/// The negative log-likelihood, in nats, of each window's tokens after the first, each given the ones before it: a sum over
/// `window.len() − 1` targets. Windows must not be empty.
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
    let device = decoder.device();
    let mut hidden = in_order(device, windows.to_vec(), |window| decoder.embed(window))?;
    let mut layers = (0..decoder.layers()).map(|index| LayerIndex(u32::try_from(index).unwrap_or(u32::MAX)));
    let mut next = layers.next().map(|index| decoder.load_layer(index)).transpose()?;
    while let Some(layer) = next.take() {
        next = thread::scope(|scope| {
            let loading = layers.next().map(|index| scope.spawn(move || decoder.load_layer(index)));
            let ran = run_layer(layer.as_ref(), device, &mut hidden, &steps);
            let loaded = loading.map(|loading| loading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            ran.and_then(|()| loaded.transpose())
        })?;
    }
    let head = decoder.load_head()?;
    let windows = windows.iter().zip(hidden).collect();
    in_order(device, windows, |(window, hidden): (&&[u32], _)| steps.take(|| nll(head.as_ref(), window, &hidden)))
}

fn run_layer(
    layer: &dyn DecoderLayer,
    device: &Device,
    hidden: &mut [Tensor],
    steps: &Steps<'_>,
) -> Result<(), ModelError> {
    in_order(device, hidden.iter_mut().collect(), |hidden: &mut Tensor| {
        *hidden = steps.take(|| layer.forward(hidden))?;
        Ok(())
    })
    .map(|_: Vec<()>| ())
}

/// The loss of one window whose last hidden states are `hidden` `[tokens, hidden]`.
pub(crate) fn nll(head: &dyn Head, window: &[u32], hidden: &Tensor) -> Result<f64, ModelError> {
    let targets = window.get(1..).unwrap_or_default();
    let mut sum = 0.0;
    for (chunk, targets) in targets.chunks(HEAD_CHUNK).enumerate() {
        let logits = head.logits(&hidden.narrow(0, chunk * HEAD_CHUNK, targets.len())?)?;
        sum = if logits.device().is_cpu() {
            losses_on_host(sum, &logits, targets)?
        } else {
            sum + losses_there(&logits, targets)?
        };
    }
    Ok(sum)
}

/// The losses of rows of logits on the CPU, added one after another to a sum.
fn losses_on_host(sum: f64, logits: &Tensor, targets: &[u32]) -> candle_core::Result<f64> {
    let vocabulary = logits.dim(1)?;
    let logits = logits.flatten_all()?.to_vec1::<f32>()?;
    let loss = |(row, &target): (&[f32], &u32)| log_sum_exp(row) - f64::from(row[target as usize]);
    Ok(logits.chunks_exact(vocabulary).zip(targets).map(loss).fold(sum, |sum, loss| sum + loss))
}

/// The losses summed where the logits are: they are far more than what is made of them.
fn losses_there(logits: &Tensor, targets: &[u32]) -> candle_core::Result<f64> {
    let largest = logits.max_keepdim(1)?;
    let sums = logits.broadcast_sub(&largest)?.exp()?.to_dtype(DType::F64)?.sum(1)?.log()?;
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let gap = (largest.to_dtype(DType::F64)? - logits.gather(&targets, 1)?.to_dtype(DType::F64)?)?.squeeze(1)?;
    (sums + gap)?.sum_all()?.to_scalar()
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::Device;
    use espalier_common::checkpoint;
    use rayon::ThreadPoolBuilder;

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle};

    fn decoder() -> Box<dyn Decoder> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families/llama-gqa-tied");
        crate::model::open(checkpoint::open(&path).unwrap(), &Device::Cpu).unwrap()
    }

    fn tokens(seed: u32, count: u32) -> Vec<u32> {
        (0..count).map(|i| (i * i + seed * 13) % 64).collect()
    }

    #[test]
    fn losses_are_those_of_the_logits() {
        let decoder = decoder();
        let (long, short) = (tokens(1, HEAD_CHUNK as u32 + 40), tokens(2, 1));
        let losses = window_nll(decoder.as_ref(), &[&long, &short], &AtomicBool::new(false), &|_, _| {}).unwrap();
        let mut hidden = decoder.embed(&long).unwrap();
        for layer in 0..2 {
            hidden = decoder.load_layer(LayerIndex(layer)).unwrap().forward(&hidden).unwrap();
        }
        let logits = decoder.load_head().unwrap().logits(&hidden).unwrap().to_vec2::<f32>().unwrap();
        let mut expected = 0.0;
        for (row, &target) in logits.iter().zip(&long[1..]) {
            let sum: f64 = row.iter().map(|&logit| f64::from(logit).exp()).sum();
            expected += sum.ln() - f64::from(row[target as usize]);
        }
        assert!((losses[0] - expected).abs() < 1e-5 * expected, "{losses:?} {expected}");
        assert!(losses[1].abs() < f64::MIN_POSITIVE);
    }

    #[test]
    fn losses_are_the_same_wherever_logits_are() {
        let (rows, vocabulary) = (HEAD_CHUNK, 700);
        // Large ones, which overflow unless the largest is taken out first.
        let logits: Vec<f32> = oracle::random(4, rows * vocabulary).into_iter().map(|value| 150.0 * value).collect();
        let targets: Vec<u32> = (0..rows as u32).map(|row| row * 37 % vocabulary as u32).collect();
        let logits = matrix(logits, vocabulary, &Device::Cpu).unwrap();
        let expected = losses_on_host(0.0, &logits, &targets).unwrap();
        for device in host::devices() {
            let found = losses_there(&logits.to_device(&device).unwrap(), &targets).unwrap();
            assert!((found - expected).abs() < 1e-6 * expected, "{device:?}: {found} {expected}");
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let windows: Vec<Vec<u32>> = (0..6).map(|seed| tokens(seed, 90)).collect();
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).collect();
        let losses = |threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let decoder = decoder();
            let losses =
                pool.install(|| window_nll(decoder.as_ref(), &windows, &AtomicBool::new(false), &|_, _| {}).unwrap());
            losses.into_iter().map(f64::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(losses(1), losses(3));
    }

    #[test]
    fn every_step_is_counted_and_a_cancelled_run_stops() {
        let decoder = decoder();
        let window = tokens(3, 10);
        let (flag, counted) = (AtomicBool::new(false), AtomicUsize::new(0));
        let progress = |_, total| {
            assert_eq!(total, 6);
            counted.fetch_add(1, Ordering::Relaxed);
        };
        window_nll(decoder.as_ref(), &[&window, &window], &flag, &progress).unwrap();
        assert_eq!(counted.load(Ordering::Relaxed), 6);
        flag.store(true, Ordering::Relaxed);
        let cancelled = window_nll(decoder.as_ref(), &[&window, &window], &flag, &progress);
        assert!(matches!(cancelled, Err(ModelError::Cancelled)));
        assert_eq!(counted.load(Ordering::Relaxed), 6);
    }
}
