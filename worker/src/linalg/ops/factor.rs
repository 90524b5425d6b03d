//! Inverses of symmetric positive definite matrices, where the matrix is.

use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};

use super::{Place, PlaceMut, values, values_mut};
use crate::device::kernels::{self, Arg, Call, Launch};
use crate::linalg::factor::{self, NotPositiveDefinite, mirror_upper};

/// Why there is no inverse.
#[derive(Debug, thiserror::Error)]
pub enum FactorError {
    /// The matrix is not positive definite in f32.
    #[error(transparent)]
    NotPositiveDefinite(#[from] NotPositiveDefinite),
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

/// The inverse `[n, n]` of a symmetric positive definite matrix, symmetric to the bit.
///
/// # Errors
/// `NotPositiveDefinite`, with the pivot; `Backend`.
pub fn inverse(matrix: &Tensor) -> std::result::Result<Tensor, FactorError> {
    let lower = inverse_of_cholesky(matrix)?;
    // A⁻¹ = MᵀM. Its symmetry is the product's, but for rounding.
    let product = lower.t()?.matmul(&lower)?;
    mirrored(&product)?;
    Ok(product)
}

/// Puts what is above the diagonal of a contiguous `matrix [n, n]` f32 below it too.
///
/// # Errors
/// If it is anything else, or what the backend says.
pub fn mirrored(matrix: &Tensor) -> Result<()> {
    let (rows, columns) = matrix.dims2()?;
    if rows != columns || matrix.dtype() != DType::F32 {
        bail!("{:?} {:?} is no square f32 matrix", matrix.dims(), matrix.dtype());
    }
    matrix.inplace_op1(&MirrorUpper)
}

/// The upper triangular `U [n, n]` with `matrix⁻¹ = UᵀU`; see [`factor::upper_of_inverse`].
///
/// # Errors
/// As [`inverse`].
pub fn upper_of_inverse(matrix: &Tensor) -> std::result::Result<Tensor, FactorError> {
    let n = matrix.dim(0)?;
    let flipped = matrix.apply_op1_no_bwd(&Reversed)?;
    match inverse_of_cholesky(&flipped) {
        Ok(lower) => Ok(lower.apply_op1_no_bwd(&Reversed)?),
        Err(FactorError::NotPositiveDefinite(NotPositiveDefinite { pivot })) => {
            Err(NotPositiveDefinite { pivot: n - 1 - pivot }.into())
        }
        Err(error) => Err(error),
    }
}

/// `L⁻¹ [n, n]` of `matrix = LLᵀ`, zeros above the diagonal.
fn inverse_of_cholesky(matrix: &Tensor) -> std::result::Result<Tensor, FactorError> {
    let op = InverseOfCholesky { failed: Cell::new(None) };
    let inverse = matrix.contiguous()?.apply_op1_no_bwd(&op);
    match op.failed.take() {
        Some(failed) => Err(failed.into()),
        None => Ok(inverse?),
    }
}

struct InverseOfCholesky {
    /// The library's errors have no room for a pivot.
    failed: Cell<Option<NotPositiveDefinite>>,
}

impl InverseOfCholesky {
    fn told<S>(&self, done: std::result::Result<S, NotPositiveDefinite>, layout: &Layout) -> Result<(S, Shape)> {
        match done {
            Ok(inverse) => Ok((inverse, layout.shape().clone())),
            Err(failed) => {
                self.failed.set(Some(failed));
                Err(candle_core::Error::wrap(failed))
            }
        }
    }
}

impl CustomOp1 for InverseOfCholesky {
    fn name(&self) -> &'static str {
        "inverse-of-cholesky"
    }

    fn cpu_fwd(&self, matrix: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, _) = layout.shape().dims2()?;
        let mut scratch = values::<f32>((matrix, layout))?.to_vec();
        self.told(factor::inverse_of_cholesky(&mut scratch, n).map(CpuStorage::F32), layout)
    }

    fn cuda_fwd(&self, matrix: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (n, _) = layout.shape().dims2()?;
        self.told(kernels::inverse_of_cholesky(matrix, layout, n)?, layout)
    }
}

/// All elements in the opposite order: rows and columns from last to first.
struct Reversed;

impl Reversed {
    fn call<'a, S>(out: PlaceMut<'a, S>, values: Place<'a, S>) -> Call<'a, S> {
        let elements = values.1.shape().elem_count();
        Call {
            launch: Launch::over("reversed", elements),
            args: vec![Arg::Write(out.0, out.1), Arg::Read(values.0, values.1), Arg::Count(elements)],
        }
    }
}

impl candle_core::CustomOp1 for Reversed {
    fn name(&self) -> &'static str {
        "reversed"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let reversed = values::<f32>((x, x_l))?.iter().rev().copied().collect();
        Ok((CpuStorage::F32(reversed), x_l.shape().clone()))
    }

    fn cuda_fwd(&self, x: &CudaStorage, x_l: &Layout) -> Result<(CudaStorage, Shape)> {
        let layout = Layout::contiguous(x_l.shape());
        let mut out = kernels::f32_like(x, x_l.shape().elem_count())?;
        Self::call((&mut out, &layout), (x, x_l)).run()?;
        Ok((out, x_l.shape().clone()))
    }
}

/// What is above the diagonal, below it too.
struct MirrorUpper;

impl MirrorUpper {
    fn call<'a, S>(matrix: PlaceMut<'a, S>) -> Result<Call<'a, S>> {
        let (n, _) = matrix.1.shape().dims2()?;
        Ok(Call {
            launch: Launch::over("mirror_upper", n * n),
            args: vec![Arg::Write(matrix.0, matrix.1), Arg::Count(n)],
        })
    }
}

impl candle_core::InplaceOp1 for MirrorUpper {
    fn name(&self) -> &'static str {
        "mirror-upper"
    }

    fn cpu_fwd(&self, matrix: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (n, _) = layout.shape().dims2()?;
        mirror_upper(values_mut((matrix, layout))?, n);
        Ok(())
    }

    fn cuda_fwd(&self, matrix: &mut CudaStorage, layout: &Layout) -> Result<()> {
        Self::call((matrix, layout))?.run()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::InplaceOp1 as _;

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle, values as numbers};

    fn largest(values: &[f64]) -> f64 {
        values.iter().fold(0.0, |largest, x| x.abs().max(largest))
    }

    #[test]
    fn inverses_equal_those_in_f64() {
        for device in host::devices() {
            for n in [1, 7, 73, 130] {
                let spd = oracle::spd(n as u64, n);
                let tensor = matrix(spd.clone(), n, &device).unwrap();
                let expected = oracle::inverse(&oracle::wide(&spd), n);
                // Condition times rounding, with the condition bounded by the norms of both.
                let condition = largest(&oracle::wide(&spd)) * largest(&expected) * n as f64;
                let tolerance = 4.0 * n as f64 * f64::from(f32::EPSILON) * condition * largest(&expected);
                let found = numbers(&inverse(&tensor).unwrap()).unwrap();
                let upper = oracle::wide(&numbers(&upper_of_inverse(&tensor).unwrap()).unwrap());
                let product = oracle::product(&oracle::transpose(&upper, n), &upper, n, n);
                for at in 0..n * n {
                    assert!((f64::from(found[at]) - expected[at]).abs() <= tolerance, "{device:?}, n={n}");
                    assert!((product[at] - expected[at]).abs() <= tolerance, "{device:?}, n={n}");
                    assert_eq!(found[at].to_bits(), found[at % n * n + at / n].to_bits(), "it is symmetric");
                    assert!(at / n <= at % n || upper[at].abs() <= 0.0, "U is upper triangular");
                }
            }
        }
    }

    #[test]
    fn failure_names_the_pivot() {
        for device in host::devices() {
            let mut diagonal = vec![0.0; 9];
            (0..3).for_each(|j| diagonal[j * 4] = 1.0);
            diagonal[8] = -1.0;
            let tensor = matrix(diagonal, 3, &device).unwrap();
            for failed in [inverse(&tensor), upper_of_inverse(&tensor)] {
                let Err(FactorError::NotPositiveDefinite(NotPositiveDefinite { pivot: 2 })) = failed else {
                    panic!("{device:?}: {failed:?}");
                };
            }
        }
    }

    #[test]
    fn the_kernels_do_what_the_passes_do() {
        let (layout, x) = (Layout::contiguous((30, 30)), CpuStorage::F32(oracle::random(2, 900)));
        let mut found = CpuStorage::F32(vec![7.0; 900]);
        let (expected, _) = Reversed.cpu_fwd(&x, &layout).unwrap();
        if host::run(Reversed::call((&mut found, &layout), (&x, &layout))) {
            assert_eq!(found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
        }
        let (mut found, mut expected) = (x.clone(), x.clone());
        MirrorUpper.cpu_fwd(&mut expected, &layout).unwrap();
        if host::run(MirrorUpper::call((&mut found, &layout)).unwrap()) {
            assert_eq!(found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
        }
        let mut found = CpuStorage::F32(vec![7.0; 900]);
        let args = vec![Arg::Write(&mut found, &layout), Arg::Count(30)];
        if host::run(Call { launch: Launch::over("identity", 900), args }) {
            let expected: Vec<f32> = (0..900).map(|at| f32::from(u8::from(at / 30 == at % 30))).collect();
            assert_eq!(found.as_slice::<f32>().unwrap(), expected);
        }
    }
}
