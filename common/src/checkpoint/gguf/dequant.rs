//! GGML's storage types, widened to f32.
//!
//! Source: ggml's block layouts (`ggml-common.h`). Products and sums are rounded one by one, as in its scalar code.

use half::{bf16, f16};

use crate::checkpoint::Dtype;

/// Elements of a K-quant block.
const K_BLOCK: usize = 256;
/// Elements of the older quants' block.
const BLOCK: usize = 32;

/// How a tensor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Plain elements.
    Plain(Dtype),
    /// f16 scale, 32 nibbles less 8.
    Q4_0,
    /// f16 scale and minimum, 32 nibbles.
    Q4_1,
    /// f16 scale, 32 signed bytes.
    Q8_0,
    /// Eight sub-blocks of 32 nibbles with 6-bit scales and minima.
    Q4K,
    /// As `Q4K`, with a fifth bit apart.
    Q5K,
    /// Sixteen sub-blocks of 16 six-bit elements with 8-bit scales.
    Q6K,
}

impl Kind {
    /// The type of this number in the file.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Plain(Dtype::F32),
            1 => Self::Plain(Dtype::F16),
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            12 => Self::Q4K,
            13 => Self::Q5K,
            14 => Self::Q6K,
            30 => Self::Plain(Dtype::Bf16),
            _ => return None,
        })
    }

    /// Elements of one block.
    pub(super) fn block_elements(self) -> usize {
        match self {
            Self::Plain(_) => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => BLOCK,
            Self::Q4K | Self::Q5K | Self::Q6K => K_BLOCK,
        }
    }

    /// Bytes of one block.
    pub(super) fn block_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.bytes(),
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Widens whole blocks.
    pub(super) fn widen(self, bytes: &[u8]) -> Vec<f32> {
        let blocks = bytes.chunks_exact(self.block_bytes());
        let mut out = Vec::with_capacity(blocks.len() * self.block_elements());
        match self {
            Self::Plain(Dtype::F32) => {
                out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
            }
            Self::Plain(Dtype::F16) => out.extend(blocks.map(|b| half_at(b, 0))),
            Self::Plain(Dtype::Bf16) => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
            Self::Q4_0 => blocks.for_each(|b| {
                let scale = half_at(b, 0);
                out.extend(nibbles(&b[2..]).map(|q| scale * (f32::from(q) - 8.0)));
            }),
            Self::Q4_1 => blocks.for_each(|b| {
                let (scale, least) = (half_at(b, 0), half_at(b, 2));
                out.extend(nibbles(&b[4..]).map(|q| scale * f32::from(q) + least));
            }),
            Self::Q8_0 => blocks.for_each(|b| {
                let scale = half_at(b, 0);
                out.extend(b[2..].iter().map(|&q| f32::from(q as i8) * scale));
            }),
            Self::Q4K => blocks.for_each(|b| {
                for (part, quants) in b[16..].chunks_exact(32).enumerate() {
                    let (low, high) = (sub_scale(b, 2 * part), sub_scale(b, 2 * part + 1));
                    out.extend(quants.iter().map(|&q| low.0 * f32::from(q & 15) - low.1));
                    out.extend(quants.iter().map(|&q| high.0 * f32::from(q >> 4) - high.1));
                }
            }),
            Self::Q5K => blocks.for_each(|b| {
                let fifth = |lane: usize, part: usize| (b[16 + lane] >> part & 1) << 4;
                for (pair, quants) in b[48..].chunks_exact(32).enumerate() {
                    let (even, odd) = (2 * pair, 2 * pair + 1);
                    let (low, high) = (sub_scale(b, even), sub_scale(b, odd));
                    let lanes = || quants.iter().enumerate();
                    out.extend(lanes().map(|(l, &q)| low.0 * f32::from(q & 15 | fifth(l, even)) - low.1));
                    out.extend(lanes().map(|(l, &q)| high.0 * f32::from(q >> 4 | fifth(l, odd)) - high.1));
                }
            }),
            Self::Q6K => blocks.for_each(|b| {
                let scale = half_at(b, 208);
                for element in 0..K_BLOCK {
                    // Halves of 128 elements, each in four runs of 32: the low nibbles of 64 bytes, then the high ones; the
                    // upper two bits of all four runs lie in 32 bytes.
                    let (half, run, lane) = (element / 128, element / 32 % 4, element % 32);
                    let low = b[64 * half + 32 * (run % 2) + lane] >> (4 * (run / 2)) & 15;
                    let high = b[128 + 32 * half + lane] >> (2 * run) & 3;
                    let quant = i16::from(low | high << 4) - 32;
                    out.push(scale * f32::from(b[192 + element / 16] as i8) * f32::from(quant));
                }
            }),
        }
        out
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// All low nibbles, then all high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> + '_ {
    bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4))
}

/// Scale and minimum of a sub-block of `Q4K` or `Q5K`: two f16 factors lead the block, then 12 bytes of 6-bit integers.
fn sub_scale(block: &[u8], part: usize) -> (f32, f32) {
    let packed = &block[4..16];
    let (scale, least) = if part < 4 {
        (packed[part] & 63, packed[part + 4] & 63)
    } else {
        let shared = packed[part + 4];
        (shared & 15 | packed[part - 4] >> 6 << 4, shared >> 4 | packed[part] >> 6 << 4)
    };
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(least))
}
