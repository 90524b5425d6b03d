//! Putting pruned weights into a loaded layer.

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::cast;

use crate::artifact::StoredTensor;
use crate::model::DecoderLayer;

/// The f32 tensor `[out, in]` that the layer computes with once a checkpoint holds `stored`.
///
/// # Errors
/// If the bytes are not those of the shape.
pub fn as_loaded(stored: &StoredTensor, device: &Device) -> candle_core::Result<Tensor> {
    let [rows, columns] = stored.shape;
    Tensor::from_vec(cast::f32_from_bytes(stored.dtype, &stored.bytes), (rows, columns), device)
}

/// Puts the tensors of a committed layer, in dataflow order, in place of the dense ones; `widths` has the number of members
/// of each group.
///
/// # Errors
/// As [`as_loaded`].
pub fn apply_layer(
    layer: &mut dyn DecoderLayer,
    widths: impl IntoIterator<Item = usize>,
    tensors: &[StoredTensor],
    device: &Device,
) -> candle_core::Result<()> {
    let places = widths.into_iter().enumerate().flat_map(|(group, members)| (0..members).map(move |m| (group, m)));
    for ((group, member), stored) in places.zip(tensors) {
        layer.set_weight(group, member, as_loaded(stored, device)?);
    }
    Ok(())
}
