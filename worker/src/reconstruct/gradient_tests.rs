//! Halves of every family against the layer's own forward pass, and their gradients against differences.

use std::path::Path;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint;
use espalier_common::ids::LayerIndex;

use super::linear::Matrix;
use super::module::{Half, SubModule};
use crate::linalg::oracle;
use crate::model::{self, Activation, Carry, DecoderLayer};

const TOKENS: usize = 21;
const SEQUENCES: usize = 2;
const FAMILIES: &[&str] = &[
    "llama-gqa-tied",
    "llama-biases",
    "mistral-window",
    "qwen2",
    "qwen3",
    "opt",
    "opt-gelu-untied",
    "opt-projected-post-norm",
];

/// A layer, and both halves' inputs and outputs as its own forward pass has them.
struct Case {
    layer: Box<dyn DecoderLayer>,
    inputs: [Vec<f32>; 2],
    outputs: [Vec<f32>; 2],
    weights: [Vec<Matrix>; 2],
}

fn elements(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn case(name: &str) -> Case {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families").join(name);
    let decoder = model::open(checkpoint::open(&path).unwrap(), &Device::Cpu).unwrap();
    let (outline, layer) = (decoder.outline(LayerIndex(1)).unwrap(), decoder.load_layer(LayerIndex(1)).unwrap());
    let (mut inputs, mut outputs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for sequence in 0..SEQUENCES {
        let values = oracle::random(7 + sequence as u64, TOKENS * decoder.hidden_size());
        let hidden = Tensor::from_vec(values, (TOKENS, decoder.hidden_size()), &Device::Cpu).unwrap();
        let mut carry = layer.begin(&hidden).unwrap();
        for (half, (inputs, outputs)) in inputs.iter_mut().zip(&mut outputs).enumerate() {
            let before = carry.residual.clone();
            inputs.extend(elements(&carry.input));
            let carried = layer.advance(2 * half, carry).unwrap();
            carry = layer.advance(2 * half + 1, Carry { residual: carried.residual, input: carried.input }).unwrap();
            outputs.extend(elements(&(&carry.residual - &before).unwrap()));
        }
    }
    let weight = |group: usize, member: usize| Matrix {
        values: elements(layer.weight(group, member)),
        columns: outline.groups[group][member].columns,
    };
    let weights = [0..2, 2..4].map(|groups| {
        groups
            .flat_map(|group| (0..outline.groups[group].len()).map(move |member| (group, member)))
            .map(|(group, member)| weight(group, member))
            .collect()
    });
    Case { layer, inputs, outputs, weights }
}

#[test]
fn halves_give_what_the_layer_puts_on_the_residual_stream() {
    for name in FAMILIES.iter().filter(|name| !name.ends_with("post-norm")) {
        let case = case(name);
        let anatomy = case.layer.anatomy(TOKENS).unwrap();
        for (index, half) in [Half::Attention, Half::FeedForward].into_iter().enumerate() {
            let module = SubModule { half, anatomy: &anatomy, tokens: TOKENS };
            let ours = module.output(&case.weights[index], &case.inputs[index]);
            assert_eq!(ours.len(), case.outputs[index].len());
            let worst = ours.iter().zip(&case.outputs[index]).fold(0.0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst < 2e-6, "{name}, {half:?}: {worst:e}");
        }
    }
}

#[test]
fn bits_of_gradients_do_not_depend_on_the_number_of_threads() {
    let case = case("qwen3");
    let anatomy = case.layer.anatomy(TOKENS).unwrap();
    for (index, half) in [Half::Attention, Half::FeedForward].into_iter().enumerate() {
        let module = SubModule { half, anatomy: &anatomy, tokens: TOKENS };
        let gradients = |threads| {
            let work = || module.gradients(&case.weights[index], &case.inputs[index], |output| output);
            oracle::with_threads(threads, work)
        };
        let one = gradients(1);
        assert!([2, 3].into_iter().all(|threads| gradients(threads) == one), "{half:?}");
    }
}

#[test]
fn gradients_agree_with_differences_along_random_directions() {
    for name in FAMILIES {
        let case = case(name);
        let anatomy = case.layer.anatomy(TOKENS).unwrap();
        for (index, half) in [Half::Attention, Half::FeedForward].into_iter().enumerate() {
            let module = SubModule { half, anatomy: &anatomy, tokens: TOKENS };
            let (weights, input) = (&case.weights[index], &case.inputs[index]);
            let dy = oracle::random(3, case.outputs[index].len());
            let loss = |weights: &[Matrix]| -> f64 {
                let output = module.output(weights, input);
                output.iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
            };
            let gradients = module.gradients(weights, input, |_| dy.clone());
            for (at, gradient) in gradients.iter().enumerate() {
                let size = weights[at].values.iter().fold(0.0f32, |max, w| max.max(w.abs()));
                let noise = oracle::random(11 + at as u64, gradient.len());
                // Half along the gradient, so that the slope is far from zero whatever the noise.
                let steepest = gradient.iter().fold(1e-12f32, |max, g| max.max(g.abs()));
                let direction: Vec<f32> =
                    noise.iter().zip(gradient).map(|(n, g)| size * (0.5 * n + g / steepest)).collect();
                let step = 2e-3;
                let moved = |sign: f32| {
                    let mut weights = weights.clone();
                    weights[at].values.iter_mut().zip(&direction).for_each(|(w, d)| *w += sign * step * d);
                    loss(&weights)
                };
                let difference = (moved(1.0) - moved(-1.0)) / (2.0 * f64::from(step));
                let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
                let error = (slope - difference).abs() / slope.abs();
                // Some inputs of a ReLU cross its kink within the step.
                let tolerance = if anatomy.activation == Activation::Relu { 2e-2 } else { 2e-3 };
                assert!(error < tolerance, "{name}, {half:?}, weight {at}: {slope:e} against {difference:e}");
            }
        }
    }
}
