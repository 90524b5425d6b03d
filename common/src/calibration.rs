//! Token blocks: the calibration (or evaluation) tokens of a run, cut once, hashed, stored, and the same for every worker.

use std::ops::Range;

use serde::Serialize;

use crate::digest::Digest;

/// Sums over calibration sequences are made by leaves, so many in all, and the leaves' sums are merged as a tree: as many workers
/// can share them.
pub const LEAVES: usize = 8;

/// A whole subtree of the tree of leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    /// Its first leaf, a multiple of their number.
    pub first: usize,
    /// Number of its leaves, a power of two.
    pub leaves: usize,
}

impl Branch {
    /// The fewest branches that some consecutive leaves are, in order.
    pub fn of(leaves: &Range<usize>) -> Vec<Self> {
        let (mut branches, mut first) = (Vec::new(), leaves.start);
        while first < leaves.end {
            let mut size = 1;
            while first.is_multiple_of(2 * size) && first + 2 * size <= leaves.end {
                size *= 2;
            }
            branches.push(Self { first, leaves: size });
            first += size;
        }
        branches
    }

    /// The first leaf of the branch that this one is merged with.
    pub fn sibling(self) -> usize {
        self.first ^ self.leaves
    }
}

/// The sequences of some consecutive leaves, of `sequences` in all.
pub fn sequences_of(leaves: &Range<usize>, sequences: usize) -> Range<usize> {
    leaves.start * sequences / LEAVES..leaves.end * sequences / LEAVES
}

/// Calibration sequences of which the last ones are held out. What is calibrated with and what is held out are summed apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Split {
    /// Sequences in all.
    pub sequences: usize,
    /// How many of them, from the first, are calibrated with.
    pub calibrating: usize,
}

impl Split {
    /// Inputs that errors are measured on: what is calibrated with and, if anything is, what is held out.
    pub fn sides(self) -> usize {
        if self.calibrating < self.sequences { 2 } else { 1 }
    }

    /// Calibrating and held-out sequences of a branch.
    pub fn parts(self, branch: Branch) -> [usize; 2] {
        let all = sequences_of(&(branch.first..branch.first + branch.leaves), self.sequences);
        let calibrating = all.end.min(self.calibrating).saturating_sub(all.start);
        [calibrating, all.len() - calibrating]
    }

    /// Sums that a branch has: of what is calibrated with, of what is held out, or of both.
    pub fn sums(self, branch: Branch) -> usize {
        self.parts(branch).into_iter().filter(|sequences| *sequences > 0).count()
    }

    /// Most sums that there are at a time while some consecutive leaves are summed one after another, and merged as a tree.
    pub fn most_sums(self, leaves: &Range<usize>) -> usize {
        let leaf = |first| self.sums(Branch { first, leaves: 1 });
        let before =
            |first| Branch::of(&(leaves.start..first)).into_iter().map(|branch| self.sums(branch)).sum::<usize>();
        leaves.clone().map(|first| before(first) + leaf(first)).max().unwrap_or(0)
    }
}

/// Sequences of equal length, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBlock {
    sequence_length: usize,
    tokens: Vec<u32>,
}

/// Bytes that are no token block.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenBlockError {
    /// Too short, or of another format.
    #[error("not a token block: {0}")]
    Malformed(&'static str),
    /// The header and the length disagree.
    #[error("token block says {sequences} sequences of {sequence_length} tokens, but has {bytes} bytes")]
    Length {
        /// As the header says.
        sequences: u64,
        /// As the header says.
        sequence_length: u64,
        /// As found.
        bytes: usize,
    },
}

const MAGIC: &[u8; 8] = b"ESPTOK01";
const HEADER_BYTES: usize = 24;

impl TokenBlock {
    /// A block of whole sequences of `sequence_length` tokens; what is left over at the end is dropped.
    ///
    /// # Panics
    /// If `sequence_length` is 0.
    pub fn new(sequence_length: usize, mut tokens: Vec<u32>) -> Self {
        tokens.truncate(tokens.len() / sequence_length * sequence_length);
        Self { sequence_length, tokens }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.tokens.len() / self.sequence_length
    }

    /// Tokens in each sequence.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// One sequence.
    pub fn sequence(&self, index: usize) -> &[u32] {
        &self.tokens[index * self.sequence_length..][..self.sequence_length]
    }

    /// All tokens, sequence after sequence.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The block as bytes: magic, sequences (u64), sequence length (u64), tokens (u32), little endian.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.tokens.len() * 4);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&(self.sequences() as u64).to_le_bytes());
        bytes.extend_from_slice(&(self.sequence_length as u64).to_le_bytes());
        for token in &self.tokens {
            bytes.extend_from_slice(&token.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote.
    ///
    /// # Errors
    /// `Malformed` or `Length`.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenBlockError> {
        let header = bytes.get(..HEADER_BYTES).ok_or(TokenBlockError::Malformed("shorter than its header"))?;
        if &header[..8] != MAGIC {
            return Err(TokenBlockError::Malformed("wrong magic"));
        }
        let word = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes of a 24-byte header"));
        let (sequences, sequence_length) = (word(8), word(16));
        let body = &bytes[HEADER_BYTES..];
        let expected = sequences.checked_mul(sequence_length).and_then(|tokens| tokens.checked_mul(4));
        if sequence_length == 0 || expected != Some(body.len() as u64) {
            return Err(TokenBlockError::Length { sequences, sequence_length, bytes: bytes.len() });
        }
        let tokens = body.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("4 bytes"))).collect();
        Ok(Self { sequence_length: sequence_length as usize, tokens })
    }

    /// Digest of [`Self::to_bytes`].
    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_drop_the_tail() {
        let block = TokenBlock::new(3, (0..8).collect());
        assert_eq!(block.sequences(), 2);
        assert_eq!(block.sequence(1), [3, 4, 5]);
        assert_eq!(TokenBlock::from_bytes(&block.to_bytes()), Ok(block));
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let mut bytes = TokenBlock::new(2, vec![1, 2, 3, 4]).to_bytes();
        assert!(TokenBlock::from_bytes(&bytes[..20]).is_err());
        bytes[8] = 255;
        assert!(matches!(TokenBlock::from_bytes(&bytes), Err(TokenBlockError::Length { .. })));
        bytes[0] = 0;
        assert!(matches!(TokenBlock::from_bytes(&bytes), Err(TokenBlockError::Malformed(_))));
    }
}
