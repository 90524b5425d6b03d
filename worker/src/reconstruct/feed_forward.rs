//! The feed-forward half of a layer and its gradients.

use pulp::Arch;
use rayon::prelude::*;

use super::linear::{self, Matrix};
use crate::model::fused::exp;
use crate::model::{Activation, Anatomy};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 15;

/// W_down·σ(W_up·x) or, gated, W_down·(silu(W_gate·x)∘W_up·x): `[rows, hidden]` to `[rows, hidden]`.
pub(super) fn output(shape: &Anatomy, weights: &[Matrix], x: &[f32]) -> Vec<f32> {
    let before = project(shape, weights, x);
    down(shape, weights, &activate(shape.activation, &before))
}

/// Gradients of the weights, given that of the output as a function of the output.
pub(super) fn gradients(
    shape: &Anatomy,
    weights: &[Matrix],
    x: &[f32],
    loss: impl FnOnce(Vec<f32>) -> Vec<f32>,
) -> Vec<Vec<f32>> {
    let mut before = project(shape, weights, x);
    let after = activate(shape.activation, &before);
    let last = &weights[weights.len() - 1];
    let dy = loss(down(shape, weights, &after));
    let of_down = linear::weight_gradient(&dy, &after, last.rows(), last.columns);
    activate_backward(shape.activation, &mut before, &linear::input_gradient(&dy, last));
    let of = |(weight, dy): (&Matrix, &Vec<f32>)| linear::weight_gradient(dy, x, weight.rows(), weight.columns);
    weights.iter().zip(&before).map(of).chain([of_down]).collect()
}

fn project(shape: &Anatomy, weights: &[Matrix], x: &[f32]) -> Vec<Vec<f32>> {
    let biases = &shape.biases[2];
    weights.iter().zip(biases).map(|(weight, bias)| linear::forward(x, weight, bias.as_deref())).collect()
}

fn down(shape: &Anatomy, weights: &[Matrix], x: &[f32]) -> Vec<f32> {
    linear::forward(x, &weights[weights.len() - 1], shape.biases[3][0].as_deref())
}

fn activate(activation: Activation, before: &[Vec<f32>]) -> Vec<f32> {
    let mut out = before[0].clone();
    match activation {
        Activation::GatedSilu => {
            out.par_chunks_mut(CHUNK).zip(before[1].par_chunks(CHUNK)).for_each(|(gate, up)| {
                Arch::new().dispatch(|| gate.iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + exp(-*g)) * u));
            });
        }
        Activation::Relu => out.iter_mut().for_each(|x| *x = x.max(0.0)),
        Activation::Gelu => out.par_chunks_mut(CHUNK).for_each(|x| x.iter_mut().for_each(|x| *x *= normal(*x).0)),
    }
    out
}

/// Turns what was before the activation into its gradient, given the gradient after it.
fn activate_backward(activation: Activation, before: &mut [Vec<f32>], dy: &[f32]) {
    match (activation, before) {
        (Activation::GatedSilu, [gate, up]) => {
            let chunks = gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK));
            chunks.for_each(|((gate, up), dy)| {
                Arch::new().dispatch(|| {
                    for ((g, u), dy) in gate.iter_mut().zip(up).zip(dy) {
                        let sigmoid = 1.0 / (1.0 + exp(-*g));
                        let silu = *g * sigmoid;
                        (*g, *u) = (dy * *u * (sigmoid + silu * (1.0 - sigmoid)), dy * silu);
                    }
                });
            });
        }
        (Activation::Gelu, before) => before[0].iter_mut().zip(dy).for_each(|(x, dy)| {
            let (share, density) = normal(*x);
            *x = dy * (share + *x * density);
        }),
        (_, before) => before[0].iter_mut().zip(dy).for_each(|(x, dy)| *x = if *x > 0.0 { *dy } else { 0.0 }),
    }
}

/// Distribution and density of the standard normal at x.
fn normal(x: f32) -> (f32, f32) {
    let x = f64::from(x);
    let share = 0.5 * (1.0 + candle_core::cpu::erf::erf_f64(x * std::f64::consts::FRAC_1_SQRT_2));
    let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    (share as f32, density as f32)
}
