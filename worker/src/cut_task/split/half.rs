//! The feed-forward half of a layer, with all its channels or those that stay, as plain numbers.

use rayon::prelude::*;

use crate::linalg::gemm::{self, View, gemm};
use crate::linalg::{transposed, values};
use crate::model::{Activation, Anatomy, DecoderLayer};
use crate::prune::structured::PairSolution;
use crate::unit::TaskError;

/// Rows of a product that one thread takes at a time; every element has one sum, so bits do not depend on the threads.
const TILE: usize = 128;

/// Weights row-major; `across` are their transposes, which products want.
#[derive(Debug, Clone)]
pub(super) struct Half {
    /// Inputs.
    pub(super) width: usize,
    /// Channels.
    pub(super) channels: usize,
    /// Outputs.
    pub(super) out: usize,
    /// `[channels, width]`; the only producer where there is no gate.
    pub(super) up: Vec<f32>,
    /// `[out, channels]`.
    pub(super) down: Vec<f32>,
    /// `[out]`.
    pub(super) bias: Option<Vec<f32>>,
    gate: Option<Vec<f32>>,
    up_bias: Option<Vec<f32>>,
    gate_bias: Option<Vec<f32>>,
    activation: Activation,
    across: Across,
}

#[derive(Debug, Clone, Default)]
struct Across {
    up: Vec<f32>,
    gate: Option<Vec<f32>>,
    down: Vec<f32>,
}

/// Hidden states of a sequence.
pub(super) struct Tokens {
    /// `[tokens, channels]`.
    pub(super) hidden: Vec<f32>,
    /// Their derivative by what the up projection gives, `[tokens, channels]`.
    pub(super) slope: Vec<f32>,
}

impl Half {
    /// The half whose consumer is in `group` of a layer.
    pub(super) fn of(layer: &dyn DecoderLayer, anatomy: &Anatomy, group: usize) -> Result<Self, TaskError> {
        let producers = anatomy.biases[group - 1].len();
        let values = |group, member| -> Result<Vec<f32>, TaskError> { Ok(values(layer.weight(group, member))?) };
        let (channels, width) = layer.weight(group - 1, 0).dims2()?;
        let gated = producers > 1;
        let bias = |group: usize, member: usize| anatomy.biases[group][member].clone();
        let mut half = Self {
            width,
            channels,
            out: layer.weight(group, 0).dim(0)?,
            up: values(group - 1, producers - 1)?,
            down: values(group, 0)?,
            bias: bias(group, 0),
            gate: if gated { Some(values(group - 1, 0)?) } else { None },
            up_bias: bias(group - 1, producers - 1),
            gate_bias: if gated { bias(group - 1, 0) } else { None },
            activation: anatomy.activation,
            across: Across::default(),
        };
        half.refresh();
        Ok(half)
    }

    /// To be called whenever a weight changed.
    pub(super) fn refresh(&mut self) {
        self.across = Across {
            up: transposed(&self.up, self.width),
            gate: self.gate.as_ref().map(|gate| transposed(gate, self.width)),
            down: transposed(&self.down, self.channels),
        };
    }

    /// The channels that stay, as they are.
    pub(super) fn narrowed_as_is(&self, kept: &[usize]) -> Self {
        let rows = |values: &[f32], width: usize| -> Vec<f32> {
            kept.iter().flat_map(|&row| values[row * width..(row + 1) * width].iter().copied()).collect()
        };
        let columns = |values: &[f32]| -> Vec<f32> {
            values.chunks(self.channels).flat_map(|row| kept.iter().map(move |&column| row[column])).collect()
        };
        let mut half = Self {
            channels: kept.len(),
            up: rows(&self.up, self.width),
            down: columns(&self.down),
            gate: self.gate.as_ref().map(|gate| rows(gate, self.width)),
            up_bias: self.up_bias.as_ref().map(|bias| rows(bias, 1)),
            gate_bias: self.gate_bias.as_ref().map(|bias| rows(bias, 1)),
            ..self.clone()
        };
        half.refresh();
        half
    }

    /// The channels that stay, with the consumer of a solution.
    pub(super) fn narrowed(&self, kept: &[usize], solution: &PairSolution) -> Result<Self, TaskError> {
        let mut whole = self.clone();
        whole.down = solution.weight.flatten_all()?.to_vec1()?;
        if let Some(bias) = &solution.bias {
            whole.bias = Some(bias.to_vec1()?);
        }
        Ok(whole.narrowed_as_is(kept))
    }

    /// Consumer and up projection at their full shapes: the one with zeros, the other with the rows of `dense`, where a channel
    /// does not stay.
    pub(super) fn widened(&self, kept: &[usize], dense: &Self) -> (Vec<f32>, Vec<f32>) {
        let (mut down, mut up) = (vec![0.0; dense.down.len()], dense.up.clone());
        for (at, &channel) in kept.iter().enumerate() {
            let row = channel * self.width..(channel + 1) * self.width;
            up[row].copy_from_slice(&self.up[at * self.width..(at + 1) * self.width]);
            for output in 0..self.out {
                down[output * dense.channels + channel] = self.down[output * self.channels + at];
            }
        }
        (down, up)
    }

    /// Hidden states of inputs `[tokens, width]`.
    pub(super) fn hidden(&self, x: &[f32]) -> Tokens {
        let project = |across: &[f32], bias: &Option<Vec<f32>>| {
            let mut y = gemm::product(x, across, self.width, self.channels);
            add_bias(&mut y, bias.as_deref());
            y
        };
        let mut hidden = project(&self.across.up, &self.up_bias);
        let mut slope = match &self.across.gate {
            Some(gate) => project(gate, &self.gate_bias),
            None => hidden.clone(),
        };
        let activation = self.activation;
        hidden.par_iter_mut().zip(&mut slope).for_each(|(h, a)| match activation {
            Activation::GatedSilu => {
                *a /= 1.0 + (-*a).exp();
                *h *= *a;
            }
            Activation::Relu => {
                *a = f32::from(u8::from(*h > 0.0));
                *h *= *a;
            }
            Activation::Gelu => {
                let x = f64::from(*h);
                let share = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                (*h, *a) = ((x * share) as f32, (share + x * density) as f32);
            }
        });
        Tokens { hidden, slope }
    }

    /// Outputs `[tokens, out]` of hidden states.
    pub(super) fn output(&self, tokens: &Tokens) -> Vec<f32> {
        let mut y = gemm::product(&tokens.hidden, &self.across.down, self.channels, self.out);
        add_bias(&mut y, self.bias.as_deref());
        y
    }
}

fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    let Some(bias) = bias else { return };
    for row in y.chunks_mut(bias.len()) {
        row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }
}

/// Adds aᵀ·b of `a [rows, m]` and `b [rows, n]` to `out [m, n]`.
pub(super) fn add_transposed_product(out: &mut [f64], a: &[f32], b: &[f32], m: usize, n: usize) {
    let rows = a.len() / m;
    out.par_chunks_mut(TILE * n).enumerate().for_each(|(tile, out)| {
        let start = tile * TILE;
        let height = out.len() / n;
        let mut sums = vec![0.0; out.len()];
        gemm(&mut sums, n, 0.0, View::new(&a[start..], rows, height, m).transposed(), View::new(b, rows, n, n), 1.0);
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += f64::from(sum));
    });
}

#[cfg(test)]
pub(super) mod fixture {
    use super::*;
    use crate::linalg::oracle;

    /// A half of 9 inputs, 21 channels and 7 outputs.
    pub(crate) fn half(seed: u64, activation: Activation, bias: bool) -> Half {
        let (width, channels, out) = (9, 21, 7);
        let gated = activation == Activation::GatedSilu;
        let random = |at: u64, length: usize| oracle::random(seed * 10 + at, length);
        let mut half = Half {
            width,
            channels,
            out,
            up: random(1, channels * width),
            down: random(2, out * channels),
            bias: bias.then(|| random(3, out)),
            gate: gated.then(|| random(4, channels * width)),
            up_bias: bias.then(|| random(5, channels)),
            gate_bias: (gated && bias).then(|| random(6, channels)),
            activation,
            across: Across::default(),
        };
        half.refresh();
        half
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn slopes_are_the_derivative_by_the_up_projection() {
        for activation in [Activation::GatedSilu, Activation::Relu, Activation::Gelu] {
            let half = fixture::half(3, activation, true);
            let x = oracle::random(5, 4 * half.width);
            let tokens = half.hidden(&x);
            let step = 1e-3;
            let mut moved = half.clone();
            moved.up_bias.as_mut().unwrap().iter_mut().for_each(|b| *b += step);
            let after = moved.hidden(&x).hidden;
            for ((y, h), a) in after.iter().zip(&tokens.hidden).zip(&tokens.slope) {
                let found = (y - h) / step;
                // A pre-activation may cross the kink of a ReLU.
                assert!(
                    (found - a).abs() < 5e-3 || (activation == Activation::Relu && h.abs() < 2.0 * step),
                    "{found} {a}"
                );
            }
        }
    }

    #[test]
    fn what_is_narrowed_is_widened_again() {
        let half = fixture::half(4, Activation::GatedSilu, true);
        let kept = [0, 2, 3, 8, 20];
        let narrow = half.narrowed_as_is(&kept);
        let (down, up) = narrow.widened(&kept, &half);
        assert_eq!(up, half.up);
        for (at, (v, w)) in down.iter().zip(&half.down).enumerate() {
            assert_eq!(v.to_bits(), if kept.contains(&(at % 21)) { w.to_bits() } else { 0 });
        }
        // Channels that went give nothing: the narrow half's output is the wide one's with those columns zeroed.
        let x = oracle::random(6, 3 * half.width);
        let mut masked = half.clone();
        masked.down = down;
        masked.refresh();
        let (narrow, wide) = (narrow.output(&narrow.hidden(&x)), masked.output(&masked.hidden(&x)));
        assert!(narrow.iter().zip(wide).all(|(x, y)| (x - y).abs() < 1e-4));
    }

    #[test]
    fn transposed_products_equal_naive_loops() {
        let (a, b) = (oracle::random(1, 6 * 130), oracle::random(2, 6 * 5));
        let mut out = vec![1.0; 130 * 5];
        add_transposed_product(&mut out, &a, &b, 130, 5);
        for (at, found) in out.iter().enumerate() {
            let sum = |row: usize| f64::from(a[row * 130 + at / 5]) * f64::from(b[row * 5 + at % 5]);
            assert!((found - 1.0 - (0..6).map(sum).sum::<f64>()).abs() < 1e-5);
        }
    }
}
