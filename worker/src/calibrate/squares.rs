//! How large the inputs of each channel are: all that a score needs, at none of the cost of a gram.

use candle_core::Tensor;
use rayon::prelude::*;

use super::gram::GramError;
use crate::linalg::values;

/// Sums `x_j²` of each input channel over calibration sequences, in f64 and in the order given, so that the bits depend
/// neither on the number of threads nor on how sequences are spread over calls.
#[derive(Debug, Clone)]
pub struct Squares {
    sums: Vec<f64>,
    tokens: usize,
}

impl Squares {
    /// An empty sum over inputs `columns` wide.
    pub fn new(columns: usize) -> Self {
        Self { sums: vec![0.0; columns], tokens: 0 }
    }

    /// Adds the inputs of some sequences, in calibration order, each `[tokens, in]` f32.
    ///
    /// # Errors
    /// `Shape`; the sums are unchanged then.
    pub fn add(&mut self, sequences: &[Tensor]) -> Result<(), GramError> {
        let columns = self.sums.len();
        let of_sequence = |inputs: &Tensor| match inputs.dims() {
            [_, width] if *width == columns => {
                let mut sums = vec![0.0; columns];
                for token in values(inputs)?.chunks_exact(columns.max(1)) {
                    sums.iter_mut().zip(token).for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
                }
                Ok(sums)
            }
            found => Err(GramError::Shape { columns, found: found.to_vec() }),
        };
        let sums = sequences.par_iter().map(of_sequence).collect::<Result<Vec<_>, _>>()?;
        for (inputs, sequence) in sequences.iter().zip(sums) {
            self.tokens += inputs.dims()[0];
            self.sums.iter_mut().zip(sequence).for_each(|(sum, more)| *sum += more);
        }
        Ok(())
    }

    /// The root of each channel's mean square.
    ///
    /// # Errors
    /// `Empty` if nothing was added, `NotFinite` with the first channel that overflowed.
    pub fn norms(&self) -> Result<Vec<f32>, GramError> {
        if self.tokens == 0 {
            return Err(GramError::Empty);
        }
        let norms: Vec<f32> = self.sums.iter().map(|sum| (sum / self.tokens as f64).sqrt() as f32).collect();
        match norms.iter().position(|norm| !norm.is_finite()) {
            Some(channel) => Err(GramError::NotFinite { channel }),
            None => Ok(norms),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::calibrate::gram::GramAccumulator;
    use crate::linalg::oracle;

    #[test]
    fn norms_are_the_roots_of_the_grams_diagonal() {
        let sequence = |seed| Tensor::from_vec(oracle::inputs(seed, 9, 6), (9, 6), &Device::Cpu).unwrap();
        let sequences: Vec<Tensor> = (0..4).map(sequence).collect();
        let (mut squares, mut apart, mut gram) = (Squares::new(6), Squares::new(6), GramAccumulator::new(6, false));
        squares.add(&sequences).unwrap();
        gram.add(&sequences, None).unwrap();
        sequences.chunks(1).for_each(|one| apart.add(one).unwrap());
        let gram = values(&gram.finish(&Device::Cpu).unwrap().gram).unwrap();
        let norms = squares.norms().unwrap();
        for (j, norm) in norms.iter().enumerate() {
            assert!((norm * norm / gram[j * 7] - 1.0).abs() < 1e-5);
        }
        assert_eq!(norms, apart.norms().unwrap());
    }

    #[test]
    fn nothing_and_what_is_not_finite_have_no_norm() {
        assert!(matches!(Squares::new(2).norms(), Err(GramError::Empty)));
        let mut squares = Squares::new(2);
        let inputs = Tensor::from_vec(vec![1.0_f32, f32::INFINITY], (1, 2), &Device::Cpu).unwrap();
        squares.add(&[inputs]).unwrap();
        assert!(matches!(squares.norms(), Err(GramError::NotFinite { channel: 1 })));
        assert!(matches!(
            Squares::new(3).add(&[Tensor::zeros((2, 2), candle_core::DType::F32, &Device::Cpu).unwrap()]),
            Err(GramError::Shape { columns: 3, .. })
        ));
    }
}
