//! Stored elements to f32 and back.

use std::borrow::Cow;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Dtype;

/// Widens little-endian elements to f32; exact for every dtype.
///
/// # Panics
/// If `bytes` is not a whole number of elements.
pub fn f32_from_bytes(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => elements::<f32>(bytes).into_owned(),
        Dtype::F16 => elements::<f16>(bytes).to_f32_vec(),
        Dtype::Bf16 => elements::<bf16>(bytes).to_f32_vec(),
    }
}

/// Narrows f32 to little-endian elements, rounding to nearest, ties to even.
///
/// This is the plain cast: a value that the dtype cannot tell from 0 becomes 0 (in F16 magnitudes up to 2⁻²⁵, in Bf16 only
/// some subnormals), and one beyond its range becomes infinite (in F16 from 65 520). Who must keep a weight non-zero, or
/// finite, checks the result.
pub fn bytes_from_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice(values).to_vec(),
        Dtype::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            bytemuck::cast_slice(&narrow).to_vec()
        }
        Dtype::Bf16 => {
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            bytemuck::cast_slice(&narrow).to_vec()
        }
    }
}

/// Narrows like [`bytes_from_f32`], except that what is not 0 stays so: a value too small for the dtype becomes the least one
/// of its sign. A weight that a method kept is thus never counted among the zeros.
pub fn kept_bytes_from_f32(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let mut bytes = bytes_from_f32(dtype, values);
    if dtype != Dtype::F32 {
        for (element, value) in bytes.chunks_exact_mut(2).zip(values) {
            // Both types are little-endian with the sign on top: nothing but a sign is left of a value that vanished.
            if value.to_bits() << 1 != 0 && element[0] == 0 && element[1] & 0x7f == 0 {
                element[0] = 1;
            }
        }
    }
    bytes
}

/// The elements in place where they are aligned, copied where not.
fn elements<T: bytemuck::Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    let size = size_of::<T>();
    assert!(bytes.len().is_multiple_of(size), "{} bytes are no whole number of elements of {size}", bytes.len());
    match bytemuck::try_cast_slice(bytes) {
        Ok(aligned) => Cow::Borrowed(aligned),
        Err(_) => Cow::Owned(bytes.chunks_exact(size).map(bytemuck::pod_read_unaligned).collect()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn narrowing_rounds_ties_to_even() {
        let ulp = f32::from_bits(0x3f80_0000 + (1 << 16)) - 1.0;
        let values = [1.0 + 0.5 * ulp, 1.0 + 1.5 * ulp, -(1.0 + 0.5 * ulp), 1.0 + 0.500_1 * ulp];
        let back = f32_from_bytes(Dtype::Bf16, &bytes_from_f32(Dtype::Bf16, &values));
        assert_eq!(back, [1.0, 1.0 + 2.0 * ulp, -1.0, 1.0 + ulp]);
    }

    #[test]
    fn small_values_vanish_only_below_half_the_least_subnormal() {
        let values = [2f32.powi(-24), 2f32.powi(-25), 1.01 * 2f32.powi(-25), -1e-30];
        let half = f32_from_bytes(Dtype::F16, &bytes_from_f32(Dtype::F16, &values));
        assert_eq!(half, [2f32.powi(-24), 0.0, 2f32.powi(-24), 0.0]);
        let brain = f32_from_bytes(Dtype::Bf16, &bytes_from_f32(Dtype::Bf16, &values));
        assert!(brain.iter().all(|&value| value != 0.0));
    }

    #[test]
    fn what_was_kept_is_never_narrowed_to_zero() {
        let values = [1e-30, -1e-30, 0.0, -0.0, 1.0, f32::from_bits(1)];
        for dtype in [Dtype::F16, Dtype::Bf16, Dtype::F32] {
            let kept = f32_from_bytes(dtype, &kept_bytes_from_f32(dtype, &values));
            assert!(kept[0] > 0.0 && kept[1] < 0.0 && kept[5] > 0.0, "{dtype:?}: {kept:?}");
            assert_eq!((kept[2].to_bits(), kept[3].to_bits(), kept[4]), (0, (-0.0f32).to_bits(), 1.0));
        }
        let plain = [0.3, -7.5, 1e-6, 65_504.0];
        assert_eq!(kept_bytes_from_f32(Dtype::F16, &plain), bytes_from_f32(Dtype::F16, &plain));
    }

    #[test]
    fn special_values_survive() {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let back = f32_from_bytes(dtype, &bytes_from_f32(dtype, &[f32::NAN, f32::INFINITY, -0.0, 0.0]));
            assert!(back[0].is_nan() && back[1] == f32::INFINITY);
            assert_eq!(back[2].to_bits(), (-0.0f32).to_bits());
            assert_eq!(back[3].to_bits(), 0);
        }
    }

    proptest! {
        #[test]
        fn stored_elements_round_trip_at_any_alignment(bits in prop::collection::vec(any::<u16>(), 0..70), shift in 0usize..4) {
            for dtype in [Dtype::F16, Dtype::Bf16] {
                let mut bytes = vec![0; shift];
                bytes.extend(bits.iter().flat_map(|bits| bits.to_le_bytes()));
                let wide = f32_from_bytes(dtype, &bytes[shift..]);
                let again = f32_from_bytes(dtype, &bytes_from_f32(dtype, &wide));
                for (a, b) in wide.iter().zip(&again) {
                    prop_assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
                }
            }
        }
    }
}
