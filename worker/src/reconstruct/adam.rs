//! Adam on the weights that survived. Source: Kingma and Ba, arXiv 1412.6980, algorithm 1.
//! Deviation: a step is a share of each matrix' root mean square, so that one rate suits models of any scale: surviving
//! weights are near 0.19 in a model of 135M parameters and near 0.02 in one of 7B.

use rayon::prelude::*;

use super::linear::Matrix;

const BETA_1: f32 = 0.9;
const BETA_2: f32 = 0.999;
const EPSILON: f32 = 1e-8;
/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 15;

/// The moments of every weight.
#[derive(Debug)]
pub(super) struct Adam {
    /// Root mean square of each matrix' surviving weights at the start.
    scales: Vec<f64>,
    first: Vec<Vec<f32>>,
    second: Vec<Vec<f32>>,
    steps: i32,
}

impl Adam {
    /// Before the first step from `start`.
    pub(super) fn new(start: &[Matrix]) -> Self {
        let zeros = || start.iter().map(|weight| vec![0.0; weight.values.len()]).collect();
        Self { scales: start.iter().map(surviving_scale).collect(), first: zeros(), second: zeros(), steps: 0 }
    }

    /// One step against `gradients`, of at most about `rate` times each matrix' scale. Weights that are zero in `start` are
    /// pruned, and stay zero.
    pub(super) fn step(&mut self, weights: &mut [Matrix], gradients: &[Vec<f32>], start: &[Matrix], rate: f64) {
        self.steps += 1;
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(self.steps);
        let rate = rate * correction(BETA_2).sqrt() / correction(BETA_1);
        let epsilon = EPSILON * correction(BETA_2).sqrt() as f32;
        let moments = self.first.iter_mut().zip(&mut self.second).zip(&self.scales);
        for (((weight, gradient), start), ((first, second), scale)) in
            weights.iter_mut().zip(gradients).zip(start).zip(moments)
        {
            let rate = (rate * scale) as f32;
            let values = weight.values.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
            let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
            values.zip(start.values.par_chunks(CHUNK)).zip(moments).for_each(|(((w, g), start), (m, v))| {
                for (((w, g), start), (m, v)) in w.iter_mut().zip(g).zip(start).zip(m.iter_mut().zip(v)) {
                    *m = BETA_1 * *m + (1.0 - BETA_1) * g;
                    *v = BETA_2 * *v + (1.0 - BETA_2) * g * g;
                    let step = rate * *m / (v.sqrt() + epsilon);
                    *w -= if *start == 0.0 { 0.0 } else { step };
                }
            });
        }
    }
}

/// Root mean square of what is not zero.
fn surviving_scale(weight: &Matrix) -> f64 {
    let kept = weight.values.iter().filter(|value| **value != 0.0);
    let (count, sum) = kept.fold((0u64, 0.0), |(count, sum), value| (count + 1, sum + f64::from(*value).powi(2)));
    (sum / count.max(1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn five_steps_follow_the_printed_algorithm() {
        let shapes = [(3, 5), (2, 4)];
        let start: Vec<Matrix> = shapes
            .iter()
            .enumerate()
            .map(|(index, &(rows, columns))| {
                let mut values = oracle::random(index as u64 + 1, rows * columns);
                values.iter_mut().step_by(3).for_each(|value| *value = 0.0);
                Matrix { values, columns }
            })
            .collect();
        let mut weights = start.clone();
        let mut adam = Adam::new(&start);
        let wide = |weights: &[Matrix]| weights.iter().map(|weight| oracle::wide(&weight.values)).collect::<Vec<_>>();
        let mut exact = wide(&start);
        let zeros = || start.iter().map(|weight| vec![0.0; weight.values.len()]).collect::<Vec<Vec<f64>>>();
        let (mut first, mut second) = (zeros(), zeros());
        for step in 1..=5 {
            let rate = 0.02 / f64::from(step);
            let gradients: Vec<Vec<f32>> = (0..start.len())
                .map(|matrix| oracle::random(10 * step as u64 + matrix as u64, start[matrix].values.len()))
                .collect();
            adam.step(&mut weights, &gradients, &start, rate);
            for (matrix, gradient) in gradients.iter().enumerate() {
                let kept: Vec<f64> =
                    oracle::wide(&start[matrix].values).into_iter().filter(|w| w.abs() > 0.0).collect();
                let scale = (kept.iter().map(|w| w * w).sum::<f64>() / kept.len() as f64).sqrt();
                for (at, g) in gradient.iter().map(|g| f64::from(*g)).enumerate() {
                    let (m, v) = (&mut first[matrix][at], &mut second[matrix][at]);
                    *m = 0.9 * *m + 0.1 * g;
                    *v = 0.999 * *v + 0.001 * g * g;
                    let unbiased = (*m / (1.0 - 0.9f64.powi(step)), *v / (1.0 - 0.999f64.powi(step)));
                    if start[matrix].values[at].abs() > 0.0 {
                        exact[matrix][at] -= rate * scale * unbiased.0 / (unbiased.1.sqrt() + 1e-8);
                    }
                }
            }
        }
        for (found, (exact, start)) in wide(&weights).iter().zip(exact.iter().zip(wide(&start))) {
            for ((found, exact), start) in found.iter().zip(exact).zip(start) {
                assert!((found - exact).abs() <= 1e-6, "{found} {exact}");
                assert!((found.abs() > 0.0) == (start.abs() > 0.0), "{found} from {start}");
            }
        }
    }
}
