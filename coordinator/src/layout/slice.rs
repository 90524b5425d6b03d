//! Cutting rows and columns out of a tensor's bytes.

use espalier_common::checkpoint::TensorHeader;
use espalier_common::checkpoint::cast::f32_from_bytes;

/// Blocks of rows or columns that stay, in a number that may be larger: zeros fill it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cut<'a> {
    /// 0: rows, or the elements of a vector; 1: columns.
    pub(crate) axis: usize,
    /// Rows or columns in a block.
    pub(crate) width: usize,
    /// Blocks that stay, ascending.
    pub(crate) kept: &'a [u32],
    /// Blocks there are afterwards.
    pub(crate) blocks: usize,
    /// The blocks are so many runs, each filled up by itself, so that query heads stay with their KV head.
    pub(crate) runs: usize,
}

impl Cut<'_> {
    /// The shape afterwards.
    pub(crate) fn header(&self, header: &TensorHeader) -> TensorHeader {
        let mut shape = header.shape.clone();
        shape[self.axis] = self.blocks * self.width;
        TensorHeader { dtype: header.dtype, shape }
    }

    /// Whether the tensor has the axis, and every block that stays.
    pub(crate) fn fits(&self, header: &TensorHeader) -> bool {
        let length = header.shape.get(self.axis).copied().unwrap_or(0);
        let end = self.kept.last().map_or(0, |&last| (last as usize + 1).saturating_mul(self.width));
        let runs = self.kept.len().is_multiple_of(self.runs) && self.blocks.is_multiple_of(self.runs);
        header.shape.len() <= 2 && runs && self.kept.len() <= self.blocks && self.width > 0 && end <= length
    }

    /// Whether all elements that do not stay are zero; `header` is the shape before, which must fit.
    pub(crate) fn cuts_only_zeros(&self, header: &TensorHeader, bytes: &[u8]) -> bool {
        let inner: usize = header.shape[self.axis + 1..].iter().product::<usize>() * header.dtype.bytes();
        let run = (self.width * inner).max(1);
        let part = (header.shape[self.axis] * inner).max(1);
        let stays = |block: usize| self.kept.binary_search(&(block as u32)).is_ok();
        let is_zero = |bytes: &[u8]| f32_from_bytes(header.dtype, bytes).iter().all(|value| value.to_bits() << 1 == 0);
        let mut runs = bytes.chunks_exact(part).flat_map(|part| part.chunks_exact(run).enumerate());
        runs.all(|(block, run)| stays(block) || is_zero(run))
    }

    /// The elements afterwards; `header` is the shape before, which must fit.
    pub(crate) fn bytes(&self, header: &TensorHeader, bytes: &[u8]) -> Vec<u8> {
        // Seen as [outer, axis, inner]: each outer part loses and gains the same runs of bytes.
        let inner: usize = header.shape[self.axis + 1..].iter().product::<usize>() * header.dtype.bytes();
        let run = self.width * inner;
        let part = header.shape[self.axis] * inner;
        let mut out = Vec::with_capacity(bytes.len() / header.shape[self.axis].max(1) * self.blocks * self.width);
        for part in bytes.chunks_exact(part.max(1)) {
            for kept in self.kept.chunks((self.kept.len() / self.runs).max(1)) {
                for &block in kept {
                    out.extend_from_slice(&part[block as usize * run..(block as usize + 1) * run]);
                }
                out.resize(out.len() + (self.blocks - self.kept.len()) / self.runs * run, 0);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use espalier_common::checkpoint::Dtype;

    use super::*;

    fn header(shape: &[usize]) -> TensorHeader {
        TensorHeader { dtype: Dtype::Bf16, shape: shape.to_vec() }
    }

    /// `[rows, columns]` of two-byte elements, each its row and its column.
    fn matrix(rows: u8, columns: u8) -> Vec<u8> {
        (0..rows).flat_map(|row| (0..columns).flat_map(move |column| [row, column])).collect()
    }

    #[test]
    fn blocks_of_rows_stay_and_the_rest_is_zero() {
        let cut = Cut { axis: 0, width: 2, kept: &[0, 2], blocks: 3, runs: 1 };
        let before = header(&[6, 3]);
        assert!(cut.fits(&before));
        assert_eq!(cut.header(&before).shape, [6, 3]);
        let all = matrix(6, 3);
        let expected = [&all[..12], &all[24..36], &[0; 12]].concat();
        assert_eq!(cut.bytes(&before, &all), expected);
    }

    #[test]
    fn what_is_cut_and_not_zero_is_told() {
        let (rows, columns) = (Cut { axis: 0, width: 2, kept: &[1], blocks: 1, runs: 1 }, header(&[4, 3]));
        let whole = matrix(4, 3);
        assert!(!rows.cuts_only_zeros(&columns, &whole));
        // A negative zero is one too.
        let zeros: Vec<u8> = [0, 0x80].repeat(6);
        assert!(rows.cuts_only_zeros(&columns, &[&zeros, &whole[12..]].concat()));
        let cut = Cut { axis: 1, width: 1, kept: &[1, 2], blocks: 2, runs: 1 };
        assert!(!cut.cuts_only_zeros(&columns, &whole), "the last row's first element is not zero");
        assert!(cut.cuts_only_zeros(&header(&[1, 3]), &[0, 0, 7, 7, 7, 7]));
    }

    #[test]
    fn blocks_of_columns_stay_in_every_row() {
        let cut = Cut { axis: 1, width: 2, kept: &[1], blocks: 1, runs: 1 };
        let before = header(&[3, 4]);
        assert_eq!(cut.header(&before).shape, [3, 2]);
        assert_eq!(cut.bytes(&before, &matrix(3, 4)), [0, 2, 0, 3, 1, 2, 1, 3, 2, 2, 2, 3]);
    }

    #[test]
    fn every_run_is_filled_up_by_itself() {
        let cut = Cut { axis: 0, width: 1, kept: &[1, 2], blocks: 4, runs: 2 };
        assert_eq!(cut.bytes(&header(&[4]), &[0, 0, 1, 1, 2, 2, 3, 3]), [1, 1, 0, 0, 2, 2, 0, 0]);
        assert!(!Cut { kept: &[1], ..cut }.fits(&header(&[4])));
    }

    #[test]
    fn vectors_are_cut_like_rows() {
        let cut = Cut { axis: 0, width: 1, kept: &[1, 3], blocks: 2, runs: 1 };
        assert_eq!(cut.bytes(&header(&[4]), &[0, 0, 1, 1, 2, 2, 3, 3]), [1, 1, 3, 3]);
    }

    #[test]
    fn what_does_not_fit_is_told() {
        let cut = |axis, width, kept, blocks| Cut { axis, width, kept, blocks, runs: 1 };
        assert!(!cut(1, 1, &[0][..], 1).fits(&header(&[4])));
        assert!(!cut(0, 2, &[2][..], 1).fits(&header(&[4, 4])));
        assert!(!cut(0, 1, &[0, 1][..], 1).fits(&header(&[4])));
    }
}
