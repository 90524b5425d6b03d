//! Chunks: tensors cut into bounded pieces, and put together again from pieces that are checked before they are believed.

use bytes::Bytes;
use candle_core::{Device, Tensor};
use espalier_proto::v1::Chunk;

use super::CHUNK_BYTES;

#[cfg(target_endian = "big")]
compile_error!("hidden states travel as little-endian f32, read in place");

/// What a receiver expects, known before the first byte: `streams` × `sequences` tensors `[tokens, hidden]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// 1, or 2 with the dense inputs beside the corrected ones.
    pub streams: usize,
    /// Calibration sequences.
    pub sequences: usize,
    /// Tokens in each.
    pub tokens: usize,
    /// Width of the residual stream.
    pub hidden: usize,
}

impl Expected {
    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        [self.sequences, self.tokens, self.hidden, 4]
            .iter()
            .fold(self.streams as u64, |bytes, &factor| bytes.saturating_mul(factor as u64))
    }
}

/// A chunk that is not what comes next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// Another shape than ours.
    #[error("tensors are {found:?}, but must be {expected:?}")]
    Shape {
        /// `[tokens, hidden]` as sent.
        found: [usize; 2],
        /// As expected.
        expected: [usize; 2],
    },
    /// Not the next piece.
    #[error("chunk is at (stream, sequence, byte) {found:?}, but must be at {expected:?}")]
    OutOfOrder {
        /// As sent.
        found: (u32, u32, u64),
        /// As expected.
        expected: (u32, u32, u64),
    },
    /// Empty, too long, or longer than what is left of the tensor.
    #[error("chunk has {bytes} bytes where 1 to {limit} may stand")]
    Length {
        /// As sent.
        bytes: usize,
        /// What may be there.
        limit: usize,
    },
    /// Damaged on the way.
    #[error("checksum of stream {stream}, sequence {sequence} at byte {offset} does not match")]
    Checksum {
        /// The stream.
        stream: u32,
        /// The sequence.
        sequence: u32,
        /// Where in the tensor.
        offset: u64,
    },
    /// More after the end.
    #[error("more chunks than {tensors} tensors have")]
    Surplus {
        /// Tensors expected.
        tensors: usize,
    },
    /// The end came early.
    #[error("the stream ended after {complete} of {tensors} tensors")]
    Truncated {
        /// Whole tensors received.
        complete: usize,
        /// Tensors expected.
        tensors: usize,
    },
    /// Sizes whose product is no size.
    #[error("tensors of [{tokens}, {hidden}] cannot exist")]
    TooLarge {
        /// Rows.
        tokens: usize,
        /// Columns.
        hidden: usize,
    },
}

/// Owns a tensor's values while chunks point into them.
struct Values(Vec<f32>);

impl AsRef<[u8]> for Values {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// Cuts a tensor `[tokens, hidden]` into chunks that share its bytes.
///
/// # Errors
/// If it is no f32 matrix.
pub fn cut(stream: u32, sequence: u32, tensor: &Tensor) -> candle_core::Result<impl Iterator<Item = Chunk> + use<>> {
    let (tokens, hidden) = tensor.dims2()?;
    let bytes = Bytes::from_owner(Values(tensor.flatten_all()?.to_vec1()?));
    Ok((0..bytes.len()).step_by(CHUNK_BYTES).map(move |start| {
        let data = bytes.slice(start..bytes.len().min(start + CHUNK_BYTES));
        let crc32 = crc32(&data);
        let (tokens, hidden) = (tokens as u32, hidden as u32);
        Chunk { sequence, stream, offset: start as u64, data, crc32, tokens, hidden }
    }))
}

/// Puts tensors together from chunks, in order: all sequences of stream 0, then of stream 1.
#[derive(Debug)]
pub struct Assembler {
    expected: Expected,
    complete: usize,
    /// The tensor under way, and how many of its bytes are there.
    values: Vec<f32>,
    filled: usize,
}

impl Assembler {
    /// Allocates one tensor; no more than one is ever under way.
    ///
    /// # Errors
    /// `TooLarge`.
    pub fn new(expected: Expected) -> Result<Self, ChunkError> {
        let Expected { tokens, hidden, .. } = expected;
        let elements = tokens.checked_mul(hidden).filter(|elements| elements.checked_mul(4).is_some());
        let elements = elements.ok_or(ChunkError::TooLarge { tokens, hidden })?;
        Ok(Self { expected, complete: 0, values: vec![0.0; elements], filled: 0 })
    }

    /// Takes the next chunk; returns the tensor that it completes, with its stream.
    ///
    /// # Errors
    /// See [`ChunkError`].
    pub fn push(&mut self, chunk: &Chunk) -> Result<Option<(usize, Tensor)>, ChunkError> {
        let Expected { streams, sequences, tokens, hidden } = self.expected;
        if self.complete == streams * sequences {
            return Err(ChunkError::Surplus { tensors: self.complete });
        }
        let found = [chunk.tokens as usize, chunk.hidden as usize];
        if found != [tokens, hidden] {
            return Err(ChunkError::Shape { found, expected: [tokens, hidden] });
        }
        let place = |complete: usize| ((complete / sequences) as u32, (complete % sequences) as u32);
        let (stream, sequence) = place(self.complete);
        let expected = (stream, sequence, self.filled as u64);
        let found = (chunk.stream, chunk.sequence, chunk.offset);
        if found != expected {
            return Err(ChunkError::OutOfOrder { found, expected });
        }
        let limit = (self.values.len() * 4 - self.filled).min(CHUNK_BYTES);
        if chunk.data.is_empty() || chunk.data.len() > limit {
            return Err(ChunkError::Length { bytes: chunk.data.len(), limit });
        }
        if crc32(&chunk.data) != chunk.crc32 {
            return Err(ChunkError::Checksum { stream, sequence, offset: chunk.offset });
        }
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.values);
        bytes[self.filled..][..chunk.data.len()].copy_from_slice(&chunk.data);
        self.filled += chunk.data.len();
        if self.filled < self.values.len() * 4 {
            return Ok(None);
        }
        let values = std::mem::replace(&mut self.values, vec![0.0; tokens * hidden]);
        (self.filled, self.complete) = (0, self.complete + 1);
        let tensor = Tensor::from_vec(values, (tokens, hidden), &Device::Cpu).expect("as many values as the shape has");
        Ok(Some((stream as usize, tensor)))
    }

    /// Checks that nothing is missing.
    ///
    /// # Errors
    /// `Truncated`.
    pub fn finish(self) -> Result<(), ChunkError> {
        let tensors = self.expected.streams * self.expected.sequences;
        if self.complete == tensors { Ok(()) } else { Err(ChunkError::Truncated { complete: self.complete, tensors }) }
    }
}

fn crc32(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXPECTED: Expected = Expected { streams: 2, sequences: 2, tokens: 700, hidden: 600 };

    fn tensor(stream: usize, sequence: usize) -> Tensor {
        let start = (stream * 10 + sequence) as f32;
        let values: Vec<f32> = (0..700 * 600).map(|index| start + index as f32).collect();
        Tensor::from_vec(values, (700, 600), &Device::Cpu).unwrap()
    }

    fn chunks() -> Vec<Chunk> {
        let places = [(0, 0), (0, 1), (1, 0), (1, 1)];
        places.iter().flat_map(|&(s, q)| cut(s as u32, q as u32, &tensor(s, q)).unwrap()).collect()
    }

    #[test]
    fn tensors_come_back_bit_for_bit() {
        let mut assembler = Assembler::new(EXPECTED).unwrap();
        let tensors: Vec<_> = chunks().iter().filter_map(|chunk| assembler.push(chunk).unwrap()).collect();
        assembler.finish().unwrap();
        for ((stream, found), sequence) in tensors.into_iter().zip([0, 1, 0, 1]) {
            assert_eq!(found.to_vec2::<f32>().unwrap(), tensor(stream, sequence).to_vec2::<f32>().unwrap());
        }
    }

    #[test]
    fn every_kind_of_foreign_chunk_is_refused() {
        let chunks = chunks();
        let spoiled = |spoil: fn(&mut Chunk)| {
            let mut assembler = Assembler::new(EXPECTED).unwrap();
            assembler.push(&chunks[0]).unwrap();
            let mut chunk = chunks[1].clone();
            spoil(&mut chunk);
            assembler.push(&chunk).unwrap_err()
        };
        assert!(matches!(spoiled(|c| c.crc32 ^= 1), ChunkError::Checksum { .. }));
        assert!(matches!(spoiled(|c| c.offset += 4), ChunkError::OutOfOrder { .. }));
        assert!(matches!(spoiled(|c| c.sequence = 1), ChunkError::OutOfOrder { .. }));
        assert!(matches!(spoiled(|c| c.hidden += 1), ChunkError::Shape { .. }));
        assert!(matches!(spoiled(|c| c.data = Bytes::new()), ChunkError::Length { .. }));
        assert!(matches!(spoiled(|c| c.data = Bytes::from(vec![0; CHUNK_BYTES])), ChunkError::Length { .. }));
    }

    #[test]
    fn too_little_and_too_much_are_told() {
        let chunks = chunks();
        let mut assembler = Assembler::new(EXPECTED).unwrap();
        for chunk in &chunks {
            assembler.push(chunk).unwrap();
        }
        assert!(matches!(assembler.push(&chunks[0]), Err(ChunkError::Surplus { tensors: 4 })));
        let mut assembler = Assembler::new(EXPECTED).unwrap();
        assembler.push(&chunks[0]).unwrap();
        assert_eq!(assembler.finish(), Err(ChunkError::Truncated { complete: 0, tensors: 4 }));
        let huge = Expected { tokens: usize::MAX, hidden: 2, ..EXPECTED };
        assert!(matches!(Assembler::new(huge), Err(ChunkError::TooLarge { .. })));
    }
}
