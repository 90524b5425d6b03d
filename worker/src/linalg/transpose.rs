//! The transpose of a matrix.

use rayon::prelude::*;

/// Rows and columns of a block.
const SIDE: usize = 16;

/// The transpose `[columns, rows]` of row-major values `[rows, columns]`.
pub fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    let mut out = vec![0.0; values.len()];
    out.par_chunks_mut((SIDE * rows).max(1)).enumerate().for_each(|(strip, out)| {
        let (left, width) = (strip * SIDE, out.len() / rows);
        for top in (0..rows).step_by(SIDE) {
            let height = SIDE.min(rows - top);
            // Rows that are a power of two apart share a few lines of the cache: each is read once, and whole.
            let mut block = [[0.0; SIDE]; SIDE];
            for (row, values) in block.iter_mut().zip(values[top * columns..].chunks(columns)).take(height) {
                row[..width].copy_from_slice(&values[left..left + width]);
            }
            for (column, out) in out.chunks_exact_mut(rows).enumerate() {
                out[top..top + height].iter_mut().zip(&block).for_each(|(out, row)| *out = row[column]);
            }
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn rows_become_columns_at_awkward_shapes() {
        for (rows, columns) in [(1, 1), (1, 40), (40, 1), (17, 33), (64, 48), (0, 3), (3, 0)] {
            let values = oracle::random(1, rows * columns);
            let found = transposed(&values, columns);
            assert_eq!(found.len(), values.len());
            for (at, value) in values.iter().enumerate() {
                assert_eq!(found[at % columns * rows + at / columns].to_bits(), value.to_bits(), "{rows} {columns}");
            }
        }
    }
}
