//! What a sparse matrix must look like, and the exact counts that follow: the one place where rounding is decided.

use serde::{Deserialize, Serialize};

/// The zeros that one weight matrix `[out, in]` must have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Pattern {
    /// A share of zeros, anywhere.
    Unstructured {
        /// Share of zeros, in `[0, 1)`.
        sparsity: f64,
    },
    /// `keep` kept of every `of` consecutive input columns, in each row.
    NofM {
        /// Weights kept in each group.
        keep: usize,
        /// Width of a group.
        of: usize,
    },
    /// A share of the layers' parameters, removed as whole heads and channels.
    Parameters {
        /// Share removed, in `[0, 1)`.
        share: f64,
    },
    /// What that comes to in one layer.
    Blocks {
        /// KV heads removed, each with its query heads.
        attention: usize,
        /// Feed-forward channels removed.
        channels: usize,
    },
    /// The zeros that another checkpoint has, matrix by matrix.
    Imported,
}

/// Why a pattern cannot be asked of a matrix.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PatternError {
    /// Outside `[0, 1)`, or not a number.
    #[error("sparsity is {0}, but must be at least 0 and below 1")]
    SparsityOutOfRange(f64),
    /// Zero or more than the group's width.
    #[error("pattern {keep}:{of} keeps {keep} of every {of}, but must keep at least 1 and at most {of}")]
    KeepOutOfRange {
        /// Weights kept in each group.
        keep: usize,
        /// Width of a group.
        of: usize,
    },
    /// Groups do not tile the rows.
    #[error("pattern {keep}:{of} needs a width divisible by {of}, but {tensor} is {width} wide")]
    Indivisible {
        /// Weights kept in each group.
        keep: usize,
        /// Width of a group.
        of: usize,
        /// The matrix.
        tensor: String,
        /// Its number of input columns.
        width: usize,
    },
    /// Not of the form `N:M`.
    #[error("`{0}` is not a pattern of the form N:M, such as 2:4")]
    Syntax(String),
}

impl Pattern {
    /// Reads `"2:4"`.
    ///
    /// # Errors
    /// `Syntax` if it is not two integers with a colon between, `KeepOutOfRange` if they make no pattern.
    pub fn parse_nofm(text: &str) -> Result<Self, PatternError> {
        let (keep, of) = text.split_once(':').ok_or_else(|| PatternError::Syntax(text.to_owned()))?;
        let number = |digits: &str| digits.trim().parse::<usize>().map_err(|_| PatternError::Syntax(text.to_owned()));
        let pattern = Self::NofM { keep: number(keep)?, of: number(of)? };
        pattern.validate()?;
        Ok(pattern)
    }

    /// Checks the pattern by itself.
    ///
    /// # Errors
    /// `SparsityOutOfRange` or `KeepOutOfRange`.
    pub fn validate(&self) -> Result<(), PatternError> {
        match *self {
            Self::Unstructured { sparsity } | Self::Parameters { share: sparsity }
                if !(0.0..1.0).contains(&sparsity) =>
            {
                Err(PatternError::SparsityOutOfRange(sparsity))
            }
            Self::NofM { keep, of } if keep == 0 || keep > of => Err(PatternError::KeepOutOfRange { keep, of }),
            _ => Ok(()),
        }
    }

    /// Checks that the matrix `tensor`, `width` input columns wide, can have this pattern.
    ///
    /// # Errors
    /// Those of [`Self::validate`], and `Indivisible`.
    pub fn validate_for(&self, tensor: &str, width: usize) -> Result<(), PatternError> {
        self.validate()?;
        match *self {
            Self::NofM { keep, of } if !width.is_multiple_of(of) => {
                Err(PatternError::Indivisible { keep, of, tensor: tensor.to_owned(), width })
            }
            _ => Ok(()),
        }
    }

    /// Share of zeros this pattern asks for.
    pub fn sparsity(&self) -> f64 {
        match *self {
            Self::Unstructured { sparsity } => sparsity,
            Self::NofM { keep, of } => 1.0 - keep as f64 / of as f64,
            Self::Parameters { share } => share,
            // It depends on the layer, or on the matrix.
            Self::Blocks { .. } | Self::Imported => 0.0,
        }
    }

    /// Number of zeros in a matrix of `rows` by `columns`: exact for N:M, rounded to nearest otherwise.
    ///
    /// A budget over a part of the matrix (a row, a row block) is the same formula on that part; methods that spread the
    /// zeros over parts must make the parts add up to this number, see [`Self::zeros_in_part`].
    pub fn zeros(&self, rows: usize, columns: usize) -> usize {
        match *self {
            Self::Unstructured { sparsity } => ((rows * columns) as f64 * sparsity).round() as usize,
            Self::NofM { keep, of } => rows * (columns / of) * (of - keep),
            // Which matrix loses what is not for one matrix to say.
            Self::Parameters { .. } | Self::Blocks { .. } => 0,
            // The other checkpoint says which.
            Self::Imported => 0,
        }
    }

    /// Number of zeros in elements `start..end` (counted in units of `unit` elements, e.g. rows) so that consecutive parts
    /// add up to exactly [`Self::zeros`] of the whole, and no part is off its own share by one element or more.
    pub fn zeros_in_part(&self, start: usize, end: usize, unit: usize) -> usize {
        self.zeros(end, unit) - self.zeros(start, unit)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unstructured { sparsity } => write!(f, "{} %", sparsity * 100.0),
            Self::NofM { keep, of } => write!(f, "{keep}:{of}"),
            Self::Parameters { share } => write!(f, "{} % fewer parameters", share * 100.0),
            Self::Blocks { attention, channels } => write!(f, "{attention} KV heads and {channels} channels fewer"),
            Self::Imported => f.write_str("the zeros of another checkpoint"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nofm_is_read_as_kept_of_every() {
        assert_eq!(Pattern::parse_nofm("2:4"), Ok(Pattern::NofM { keep: 2, of: 4 }));
        assert_eq!(Pattern::parse_nofm("5:4"), Err(PatternError::KeepOutOfRange { keep: 5, of: 4 }));
        assert_eq!(Pattern::parse_nofm("2/4"), Err(PatternError::Syntax("2/4".into())));
    }

    #[test]
    fn sparsity_must_lie_in_range() {
        for sparsity in [-0.1, 1.0, f64::NAN, f64::INFINITY] {
            assert!(Pattern::Unstructured { sparsity }.validate().is_err(), "{sparsity}");
        }
    }

    proptest! {
        #[test]
        fn parts_add_up_to_the_whole(sparsity in 0.0..1.0f64, rows in 1usize..200, columns in 1usize..200, block in 1usize..64) {
            let pattern = Pattern::Unstructured { sparsity };
            let mut total = 0;
            for start in (0..rows).step_by(block) {
                let end = (start + block).min(rows);
                let zeros = pattern.zeros_in_part(start, end, columns);
                prop_assert!(zeros <= (end - start) * columns);
                prop_assert!((zeros as f64 - ((end - start) * columns) as f64 * sparsity).abs() <= 1.0);
                total += zeros;
            }
            prop_assert_eq!(total, pattern.zeros(rows, columns));
        }
    }
}
