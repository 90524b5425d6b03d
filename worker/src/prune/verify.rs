//! Re-checks every solution in production: no solver marks its own work.

use candle_core::Tensor;
use espalier_common::fault::FaultClass;
use espalier_common::pattern::Pattern;

use super::measure::{self, Tile};
use super::{InputStats, Problem};
use crate::linalg::values;

/// What is wrong with a solution. All of these are bugs of ours, but for a failing backend. Messages say it of `it`: whoever asked for
/// the check says which solution that is.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Another shape than the dense weight's.
    #[error("its shape is {found:?}, but its weight's is {expected:?}")]
    Shape {
        /// The sublayer.
        tensor: String,
        /// Shape of the solution.
        found: Vec<usize>,
        /// Shape of the weight.
        expected: Vec<usize>,
    },
    /// NaN or infinity.
    #[error("it is not finite at row {row}, column {column}")]
    NotFinite {
        /// The sublayer.
        tensor: String,
        /// Output channel.
        row: usize,
        /// Input channel.
        column: usize,
    },
    /// Too few zeros, or more than the pattern and the zeros of the dense weight explain.
    #[error("it has {found} zeros, but pattern {pattern} asks for {expected}")]
    Zeros {
        /// The sublayer.
        tensor: String,
        /// The pattern.
        pattern: Pattern,
        /// Zeros found.
        found: usize,
        /// Zeros asked for.
        expected: usize,
    },
    /// A group keeps too many.
    #[error("it breaks pattern {pattern} at row {row}, column {column}")]
    Group {
        /// The sublayer.
        tensor: String,
        /// The pattern.
        pattern: Pattern,
        /// Output channel.
        row: usize,
        /// First input channel of the group.
        column: usize,
    },
    /// A zero of the mask is none of the solution.
    #[error("it is not zero at row {row}, column {column}, where its mask is")]
    Revived {
        /// The sublayer.
        tensor: String,
        /// Output channel.
        row: usize,
        /// Input channel.
        column: usize,
    },
    /// A column that was to go is not zero.
    #[error("it is not zero in column {column}, which was removed")]
    Column {
        /// The sublayer.
        tensor: String,
        /// Input channel.
        column: usize,
    },
    /// A row that was to go is not zero.
    #[error("it is not zero in row {row}, which was removed")]
    Row {
        /// The sublayer.
        tensor: String,
        /// Output channel.
        row: usize,
    },
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl VerifyError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Backend(_) => FaultClass::RetryElsewhere,
            _ => FaultClass::Bug,
        }
    }
}

/// A solution that was found to be in order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verified {
    /// ‖W'X̂ − Y‖² / ‖Y‖² on the calibration inputs; 0 if ‖Y‖ is. Y is WX where the statistics have the dense inputs X, else WX̂.
    pub rel_error: f64,
    /// The same on the held-out inputs.
    pub held_out_error: Option<f64>,
    /// Weights that are zero.
    pub zeros: u64,
    /// All weights.
    pub elements: u64,
}

/// Checks `solution [out, in]`, as it will be stored, against the problem's pattern; returns how many of its weights are zero.
///
/// Weights that were zero in the dense matrix may stay zero where the pattern keeps them.
///
/// # Errors
/// See [`VerifyError`].
pub fn check(problem: &Problem<'_>, solution: &Tensor) -> Result<u64, VerifyError> {
    let tensor = || problem.tensor.to_owned();
    if solution.dims() != problem.weight.dims() {
        let (found, expected) = (solution.dims().to_vec(), problem.weight.dims().to_vec());
        return Err(VerifyError::Shape { tensor: tensor(), found, expected });
    }
    let (rows, columns) = problem.weight.dims2()?;
    let dense = values(problem.weight)?;
    let solved = values(solution)?;
    if let Some(index) = solved.iter().position(|value| !value.is_finite()) {
        return Err(VerifyError::NotFinite { tensor: tensor(), row: index / columns, column: index % columns });
    }
    let pattern = problem.pattern;
    let zeros = count_zeros(&solved);
    let explained = solved.iter().zip(&dense).filter(|(v, w)| is_zero(**v) && is_zero(**w)).count();
    let mask = problem.imported.map(values).transpose()?;
    let expected = mask.as_ref().map_or_else(|| pattern.zeros(rows, columns), |mask| count_zeros(mask));
    if let Some(mask) = &mask
        && let Some(index) = solved.iter().zip(mask).position(|(v, mask)| is_zero(*mask) && !is_zero(*v))
    {
        return Err(VerifyError::Revived { tensor: tensor(), row: index / columns, column: index % columns });
    }
    if zeros < expected || zeros > expected + explained {
        return Err(VerifyError::Zeros { tensor: tensor(), pattern, found: zeros, expected });
    }
    if let Pattern::NofM { keep, of } = pattern
        && let Some(group) = solved.chunks(of).position(|group| count_zeros(group) < of - keep)
    {
        let index = group * of;
        return Err(VerifyError::Group { tensor: tensor(), pattern, row: index / columns, column: index % columns });
    }
    Ok(zeros as u64)
}

/// [`check`], and measures the solution's error.
///
/// # Errors
/// See [`VerifyError`].
pub fn verify(problem: &Problem<'_>, stats: &InputStats, solution: &Tensor) -> Result<Verified, VerifyError> {
    let zeros = check(problem, solution)?;
    let (rel_error, held_out_error) = rel_errors(solution, problem.weight, stats)?;
    Ok(Verified { rel_error, held_out_error, zeros, elements: solution.elem_count() as u64 })
}

/// Checks a cut consumer `solution [out, in]`, as it will be stored: finite, and zero in every input that does not stay; and
/// measures its error. Where there is a bias it is the last column of both matrices, and 1 the last input of the statistics.
///
/// # Errors
/// See [`VerifyError`].
pub fn verify_cut(
    tensor: &str,
    dense: &Tensor,
    solution: &Tensor,
    stays: impl Fn(usize) -> bool,
    stats: &InputStats,
) -> Result<Verified, VerifyError> {
    let tensor = || tensor.to_owned();
    if solution.dims() != dense.dims() {
        let (found, expected) = (solution.dims().to_vec(), dense.dims().to_vec());
        return Err(VerifyError::Shape { tensor: tensor(), found, expected });
    }
    let columns = dense.dim(1)?;
    let solved = values(solution)?;
    if let Some(index) = solved.iter().position(|value| !value.is_finite()) {
        return Err(VerifyError::NotFinite { tensor: tensor(), row: index / columns, column: index % columns });
    }
    let wrong = |(index, value): (usize, &f32)| (value.to_bits() != 0 && !stays(index % columns)).then_some(index);
    if let Some(index) = solved.iter().enumerate().find_map(wrong) {
        return Err(VerifyError::Column { tensor: tensor(), column: index % columns });
    }
    let (rel_error, held_out_error) = rel_errors(solution, dense, stats)?;
    Ok(Verified { rel_error, held_out_error, zeros: count_zeros(&solved) as u64, elements: solved.len() as u64 })
}

/// Checks a cut producer `solution [out, in]`, as it will be stored: finite, and zero in every row that does not stay.
///
/// # Errors
/// `NotFinite`, `Row`, `Backend`.
pub fn verify_rows(tensor: &str, solution: &Tensor, stays: impl Fn(usize) -> bool) -> Result<(), VerifyError> {
    let columns = solution.dim(1)?;
    for (row, solved) in values(solution)?.chunks(columns.max(1)).enumerate() {
        if let Some(column) = solved.iter().position(|value| !value.is_finite()) {
            return Err(VerifyError::NotFinite { tensor: tensor.to_owned(), row, column });
        }
        if !stays(row) && solved.iter().any(|value| value.to_bits() != 0) {
            return Err(VerifyError::Row { tensor: tensor.to_owned(), row });
        }
    }
    Ok(())
}

/// The relative error of a whole solution, and that on held-out inputs.
pub(crate) fn rel_errors(
    solution: &Tensor,
    dense: &Tensor,
    stats: &InputStats,
) -> candle_core::Result<(f64, Option<f64>)> {
    let tiles: Vec<Tile> = Tile::of(0, solution.dim(0)?).collect();
    let numbers = measure::measure(&tiles, &[(solution, dense)], stats)?;
    Ok(measure::relative(&numbers.concat(), stats.held_out.is_some()))
}

fn is_zero(value: f32) -> bool {
    value.to_bits() & 0x7fff_ffff == 0
}

fn count_zeros(values: &[f32]) -> usize {
    values.iter().filter(|value| is_zero(**value)).count()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::matrix;
    use crate::prune::fixture;

    const HALF: Pattern = Pattern::Unstructured { sparsity: 0.5 };

    fn check(dense: &[f32], solved: &[f32], pattern: Pattern) -> Result<Verified, VerifyError> {
        let columns = 4;
        let weight = matrix(dense.to_vec(), columns, &Device::Cpu).unwrap();
        let solution = matrix(solved.to_vec(), columns, &Device::Cpu).unwrap();
        let mut gram = vec![0.0; 16];
        (0..4).for_each(|j| gram[j * 5] = 1.0);
        let stats = fixture::LayerProblem::new(dense.to_vec(), gram, columns, 10).stats;
        let problem = Problem { tensor: "a.weight", weight: &weight, pattern, imported: None };
        verify(&problem, &stats, &solution)
    }

    #[test]
    fn the_zeros_of_a_mask_must_be_met_one_by_one() {
        let tensor = |values: &[f32]| matrix(values.to_vec(), 4, &Device::Cpu).unwrap();
        let (weight, mask) = (tensor(&[1.0, 2.0, 3.0, 4.0]), tensor(&[0.0, 5.0, 0.0, 6.0]));
        let stats = fixture::random(1, 1, 4, 9).stats;
        let pattern = Pattern::Imported;
        let problem = Problem { tensor: "a.weight", weight: &weight, pattern, imported: Some(&mask) };
        assert_eq!(verify(&problem, &stats, &tensor(&[0.0, 2.5, 0.0, 4.5])).unwrap().zeros, 2);
        let moved = verify(&problem, &stats, &tensor(&[0.0, 0.0, 3.0, 4.0]));
        assert!(matches!(moved, Err(VerifyError::Revived { row: 0, column: 2, .. })));
        let more = verify(&problem, &stats, &tensor(&[0.0, 0.0, 0.0, 4.0]));
        assert!(matches!(more, Err(VerifyError::Zeros { found: 3, expected: 2, .. })));
    }

    #[test]
    fn a_sound_solution_is_measured() {
        let verified = check(&[1.0, 2.0, 3.0, 4.0], &[0.0, 0.0, 3.0, 4.0], HALF).unwrap();
        assert!((verified.rel_error - 5.0 / 30.0).abs() < 1e-12);
        assert_eq!((verified.zeros, verified.elements, verified.held_out_error), (2, 4, None));
    }

    #[test]
    fn wrong_counts_groups_and_values_are_found() {
        let dense = [1.0, 2.0, 3.0, 4.0, 1.0, 1.0, 1.0, 1.0];
        let two_of_four = Pattern::NofM { keep: 2, of: 4 };
        let few = check(&dense, &[0.0, 0.0, 3.0, 4.0, 0.0, 1.0, 1.0, 1.0], HALF);
        assert!(matches!(few, Err(VerifyError::Zeros { found: 3, expected: 4, .. })));
        let many = check(&dense, &[0.0, 0.0, 0.0, 4.0, 0.0, 1.0, 0.0, 1.0], HALF);
        assert!(matches!(many, Err(VerifyError::Zeros { found: 5, .. })));
        let group = check(&dense, &[0.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 1.0], two_of_four);
        assert!(matches!(group, Err(VerifyError::Group { row: 0, column: 0, .. })));
        let nan = check(&dense, &[0.0, 2.0, 0.0, f32::NAN, 0.0, 0.0, 1.0, 1.0], two_of_four);
        assert!(matches!(nan, Err(VerifyError::NotFinite { row: 0, column: 3, .. })));
    }

    #[test]
    fn zeros_of_the_dense_weight_may_be_kept() {
        assert_eq!(check(&[0.0, 0.0, 0.0, 4.0], &[0.0, 0.0, 0.0, 4.0], HALF).unwrap().zeros, 3);
    }

    #[test]
    fn rows_that_went_must_be_zero() {
        let check = |values: &[f32]| {
            verify_rows("a.weight", &matrix(values.to_vec(), 2, &Device::Cpu).unwrap(), |row| row != 1)
        };
        check(&[1.0, 0.0, 0.0, 0.0, 2.0, 3.0]).unwrap();
        assert!(matches!(check(&[1.0, 0.0, 0.0, -0.0]), Err(VerifyError::Row { row: 1, .. })));
        assert!(matches!(check(&[1.0, f32::NAN]), Err(VerifyError::NotFinite { row: 0, column: 1, .. })));
    }
}
