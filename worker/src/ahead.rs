//! The weights of the next layer, read and converted while this one is still being finished.
//!
//! Reading begins once a layer's last matrix is solved: what solving took is free again by then, so the second layer's weights
//! do not add to the peak, and the forward pass that is left takes longer than reading. Waiting for the commit hides it too.
//!
//! Only where reading takes long: from an object store, or to a GPU. From this machine's files to its own memory it is a hundredth of
//! a layer's time, and the allocator would keep what another thread allocates apart: 65 MB for SmolLM2-135M, and no second less.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use candle_core::Device;
use espalier_common::ids::LayerIndex;
use espalier_common::store::is_object_url;

use crate::model::{Decoder, DecoderLayer, ModelError};

type Loaded = Result<Box<dyn DecoderLayer>, ModelError>;

/// At most one layer beside the one that is worked on.
pub struct Ahead {
    is_on: bool,
    reading: Mutex<Option<(LayerIndex, JoinHandle<Loaded>)>>,
}

impl Ahead {
    /// Nothing is read yet; ever, if it is not on.
    pub fn new(is_on: bool) -> Self {
        Self { is_on, reading: Mutex::default() }
    }

    /// Whether it pays for a model from `source` that is run on `device`.
    pub fn pays(source: &str, device: &Device) -> bool {
        is_object_url(source) || !device.is_cpu()
    }

    /// Begins to read the layer after `layer`, if there is one and it is on. What was read before for nobody gives way to it.
    pub fn read_after(&self, decoder: &Arc<dyn Decoder>, layer: LayerIndex) {
        let next = LayerIndex(layer.0 + 1);
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.is_on
            || next.0 as usize >= decoder.layers()
            || reading.as_ref().is_some_and(|(begun, _)| *begun == next)
        {
            return;
        }
        let decoder = Arc::clone(decoder);
        let thread = Builder::new().name("ahead".to_owned()).spawn(move || decoder.load_layer(next));
        match thread {
            Ok(thread) => *reading = Some((next, thread)),
            Err(error) => {
                tracing::warn!(layer = %next, %error, "no thread to read ahead; it is read when it is needed")
            }
        }
    }

    /// Lets go of what was read, if that has not been taken.
    pub fn forget(&self) {
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The layer that is being read, or was and has not been taken.
    #[cfg(test)]
    pub(crate) fn begun(&self) -> Option<LayerIndex> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|(layer, _)| *layer)
    }

    /// A layer: what was read ahead, if it was this one, or read now.
    ///
    /// # Errors
    /// See [`Decoder::load_layer`]. What went wrong ahead is tried again first.
    pub fn take(&self, decoder: &dyn Decoder, layer: LayerIndex) -> Loaded {
        let reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some((_, thread)) = reading.filter(|(begun, _)| *begun == layer) {
            match thread.join().unwrap_or_else(|panic| resume_unwind(panic)) {
                Ok(loaded) => return Ok(loaded),
                Err(error) => tracing::warn!(%layer, %error, "could not be read ahead; it is read again"),
            }
        }
        decoder.load_layer(layer)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use candle_core::Tensor;
    use espalier_common::checkpoint;
    use espalier_common::outline::LayerOutline;
    use espalier_common::structure::{AttentionUnit, Structure};

    use super::*;
    use crate::model::{self, Head};

    /// A decoder that counts what is loaded, and whose first loads fail.
    struct Counting {
        decoder: Box<dyn Decoder>,
        loads: AtomicUsize,
        failing: usize,
    }

    impl Decoder for Counting {
        fn family(&self) -> &'static str {
            self.decoder.family()
        }
        fn layers(&self) -> usize {
            self.decoder.layers()
        }
        fn hidden_size(&self) -> usize {
            self.decoder.hidden_size()
        }
        fn vocabulary_size(&self) -> usize {
            self.decoder.vocabulary_size()
        }
        fn max_sequence_length(&self) -> Option<usize> {
            self.decoder.max_sequence_length()
        }
        fn outline(&self, layer: LayerIndex) -> Result<LayerOutline, ModelError> {
            self.decoder.outline(layer)
        }
        fn structure(&self, unit: AttentionUnit) -> Structure {
            self.decoder.structure(unit)
        }
        fn device(&self) -> &Device {
            self.decoder.device()
        }
        fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
            self.decoder.embed(tokens)
        }
        fn load_layer(&self, layer: LayerIndex) -> Result<Box<dyn DecoderLayer>, ModelError> {
            if self.loads.fetch_add(1, Ordering::SeqCst) < self.failing {
                return Err(ModelError::Cancelled);
            }
            self.decoder.load_layer(layer)
        }
        fn load_head(&self) -> Result<Box<dyn Head>, ModelError> {
            self.decoder.load_head()
        }
    }

    fn counting(failing: usize) -> (Arc<Counting>, Arc<dyn Decoder>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families/llama-gqa-tied");
        let decoder = model::open(checkpoint::open(&path).unwrap(), &Device::Cpu).unwrap();
        let counting = Arc::new(Counting { decoder, loads: AtomicUsize::new(0), failing });
        (Arc::clone(&counting), counting)
    }

    /// The first weight of a layer, to tell layers apart.
    fn first(layer: &dyn DecoderLayer) -> Vec<f32> {
        crate::linalg::values(layer.weight(0, 0)).unwrap()
    }

    #[test]
    fn the_layer_that_was_read_ahead_is_read_once_and_another_is_not_taken_for_it() {
        let (counting, decoder) = counting(0);
        let expected: Vec<_> = (0..2).map(|layer| first(&*decoder.load_layer(LayerIndex(layer)).unwrap())).collect();
        assert_ne!(expected[0], expected[1]);
        let (ahead, loads) = (Ahead::new(true), || counting.loads.load(Ordering::SeqCst) - 2);

        ahead.read_after(&decoder, LayerIndex(0));
        ahead.read_after(&decoder, LayerIndex(0));
        assert_eq!(first(&*ahead.take(&*decoder, LayerIndex(1)).unwrap()), expected[1]);
        assert_eq!(loads(), 1);
        assert_eq!(first(&*ahead.take(&*decoder, LayerIndex(1)).unwrap()), expected[1]);
        assert_eq!(loads(), 2);

        ahead.read_after(&decoder, LayerIndex(0));
        assert_eq!(ahead.begun(), Some(LayerIndex(1)));
        assert_eq!(first(&*ahead.take(&*decoder, LayerIndex(0)).unwrap()), expected[0]);
        assert_eq!(ahead.begun(), None);
    }

    #[test]
    fn reading_ahead_is_for_what_is_far_away() {
        assert!(Ahead::pays("s3://bucket/model", &Device::Cpu));
        assert!(!Ahead::pays("/models/model", &Device::Cpu));
        let (_, decoder) = counting(0);
        let ahead = Ahead::new(false);
        ahead.read_after(&decoder, LayerIndex(0));
        assert_eq!(ahead.begun(), None);
    }

    #[test]
    fn nothing_comes_after_the_last_layer() {
        let (counting, decoder) = counting(0);
        let ahead = Ahead::new(true);
        ahead.read_after(&decoder, LayerIndex(decoder.layers() as u32 - 1));
        assert_eq!(ahead.begun(), None);
        assert_eq!(counting.loads.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_failed_ahead_is_read_again_and_only_that_counts() {
        let (counting, decoder) = counting(1);
        let ahead = Ahead::new(true);
        ahead.read_after(&decoder, LayerIndex(0));
        ahead.take(&*decoder, LayerIndex(1)).unwrap();
        assert_eq!(counting.loads.load(Ordering::SeqCst), 2);
    }
}
