//! Putting pruned weights into a loaded layer.

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::cast;
use espalier_common::outline::LayerOutline;

use crate::artifact::StoredTensor;
use crate::model::DecoderLayer;

/// The f32 tensor, `[out, in]` or `[out]`, that the layer computes with once a checkpoint holds `stored`.
///
/// # Errors
/// If the bytes are not those of the shape.
pub fn as_loaded(stored: &StoredTensor, device: &Device) -> candle_core::Result<Tensor> {
    Tensor::from_vec(cast::f32_from_bytes(stored.dtype, &stored.bytes), stored.shape.as_slice(), device)
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
        layer.set_weight(group, member, as_loaded(stored, device)?)?;
    }
    Ok(())
}

/// Puts weights and biases into a layer by their names; names that are no sublayer's weight or bias are passed over.
///
/// # Errors
/// As [`as_loaded`].
pub fn apply_named(
    layer: &mut dyn DecoderLayer,
    outline: &LayerOutline,
    tensors: &[StoredTensor],
    device: &Device,
) -> candle_core::Result<()> {
    for (group, members) in outline.groups.iter().enumerate() {
        for (member, sublayer) in members.iter().enumerate() {
            let bias = bias_name(&sublayer.tensor);
            for stored in tensors {
                if stored.name == sublayer.tensor {
                    layer.set_weight(group, member, as_loaded(stored, device)?)?;
                } else if stored.name == bias {
                    layer.set_bias(group, member, as_loaded(stored, device)?);
                }
            }
        }
    }
    Ok(())
}

/// The name of the bias beside a weight.
pub fn bias_name(weight: &str) -> String {
    format!("{}.bias", weight.strip_suffix(".weight").unwrap_or(weight))
}
