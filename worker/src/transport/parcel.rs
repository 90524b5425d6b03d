//! Letters between a layer's owner and its assistants: a head that says what it is about, and a body in checked pieces.

use std::borrow::Cow;

use bytes::Bytes;
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::{Head, Piece};

use super::CHUNK_BYTES;
use crate::calibrate::cache::{CacheError, Entry};

/// A letter that came whole.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    /// What it is about.
    pub matter: Matter,
    /// Its body, of the size that the matter says.
    pub body: Vec<u8>,
}

/// A letter to be sent.
#[derive(Debug)]
pub struct Outgoing {
    /// What it is about.
    pub matter: Matter,
    /// Its body.
    pub body: Body,
}

/// The body of a letter to be sent.
#[derive(Debug)]
pub enum Body {
    /// These bytes; they may be none.
    Bytes(Bytes),
    /// Hidden states, read when it is their turn.
    States(Entry),
}

impl Outgoing {
    /// A letter without a body.
    pub fn of(matter: Matter) -> Self {
        Self { matter, body: Body::Bytes(Bytes::new()) }
    }

    /// A letter with these values.
    pub fn with_values<T: bytemuck::NoUninit + Send + 'static>(matter: Matter, values: Vec<T>) -> Self {
        Self { matter, body: Body::Bytes(bytes_of(values)) }
    }
}

impl Body {
    /// The bytes, read from the cache if that is where they are.
    ///
    /// # Errors
    /// See [`CacheError`].
    pub fn into_bytes(self) -> Result<Bytes, CacheError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::States(entry) => Ok(bytes_of(entry.take()?.flatten_all()?.to_vec1::<f32>()?)),
        }
    }
}

/// The bytes of numbers, which are not copied.
pub fn bytes_of<T: bytemuck::NoUninit + Send + 'static>(values: Vec<T>) -> Bytes {
    Bytes::from_owner(Values(values))
}

/// The numbers of a body, whose length is a multiple of theirs: where they are, if they lie as numbers must.
pub fn numbers<T: bytemuck::Pod>(body: &[u8]) -> Cow<'_, [T]> {
    let copied = |_| {
        let mut numbers = vec![T::zeroed(); body.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut numbers).copy_from_slice(body);
        Cow::Owned(numbers)
    };
    bytemuck::try_cast_slice(body).map_or_else(copied, Cow::Borrowed)
}

/// Owns numbers while pieces point into their bytes.
struct Values<T>(Vec<T>);

impl<T: bytemuck::NoUninit> AsRef<[u8]> for Values<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// A head or piece that is not what may come next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParcelError {
    /// A head that says nothing we know.
    #[error("a letter is about nothing")]
    NoMatter,
    /// About something that the layer does not have, or that is not this side's to say.
    #[error("a letter is about what this layer does not have: {0}")]
    Foreign(String),
    /// Another size than the matter has.
    #[error("the body of a letter has {found} bytes, but must have {expected}")]
    Size {
        /// As announced.
        found: u64,
        /// As the matter says.
        expected: u64,
    },
    /// Something that may only be said at the beginning, or nothing.
    #[error("a parcel came that may not come now")]
    OutOfTurn,
    /// Not the next piece, or not of a size that it may have.
    #[error("a piece of {bytes} bytes is at {found}, but 1 to {limit} may stand at {expected}")]
    Piece {
        /// Its length.
        bytes: usize,
        /// Where it says it is.
        found: u64,
        /// Where it must be.
        expected: u64,
        /// How long it may be.
        limit: usize,
    },
    /// Damaged on the way.
    #[error("checksum of a piece at byte {offset} does not match")]
    Checksum {
        /// Where in the body.
        offset: u64,
    },
}

/// The head of a letter whose body is `body`.
pub fn head(matter: Matter, body: &Bytes) -> Head {
    Head { body_bytes: body.len() as u64, matter: Some(matter) }
}

/// Cuts a body into pieces that share its bytes.
pub fn pieces(body: Bytes) -> impl Iterator<Item = Piece> {
    (0..body.len()).step_by(CHUNK_BYTES).map(move |start| {
        let data = body.slice(start..body.len().min(start + CHUNK_BYTES));
        Piece { offset: start as u64, crc32: crc32fast::hash(&data), data, bytes: 0 }
    })
}

/// What a head announces, if it is a letter that may come now: what it is about, and the bytes of its body. `size_of` says how
/// large the body must be, if the matter is one that may come; nothing is allocated before.
///
/// # Errors
/// `NoMatter`, `Foreign`, `Size`.
pub fn announced(head: Head, size_of: impl FnOnce(&Matter) -> Option<u64>) -> Result<(Matter, usize), ParcelError> {
    let matter = head.matter.ok_or(ParcelError::NoMatter)?;
    let expected = size_of(&matter).ok_or_else(|| ParcelError::Foreign(format!("{matter:?}")))?;
    if head.body_bytes != expected {
        return Err(ParcelError::Size { found: head.body_bytes, expected });
    }
    let bytes = usize::try_from(expected).map_err(|_| ParcelError::Size { found: expected, expected: 0 })?;
    Ok((matter, bytes))
}

/// Puts a body together from its pieces.
#[derive(Debug)]
pub struct PieceBox {
    body: Vec<u8>,
    bytes: usize,
}

impl PieceBox {
    /// Room for a body whose size is known to be right.
    pub fn new(bytes: usize) -> Self {
        Self { body: Vec::with_capacity(bytes), bytes }
    }

    /// Whether all of it is there.
    pub fn is_whole(&self) -> bool {
        self.body.len() == self.bytes
    }

    /// Takes the next piece, with its bytes.
    ///
    /// # Errors
    /// `Piece`, `Checksum`.
    pub fn add(&mut self, piece: &Piece) -> Result<(), ParcelError> {
        self.admit(piece, piece.data.len())?;
        if crc32fast::hash(&piece.data) != piece.crc32 {
            return Err(ParcelError::Checksum { offset: piece.offset });
        }
        self.body.extend_from_slice(&piece.data);
        Ok(())
    }

    /// Takes the next piece, whose bytes lie elsewhere: `read` puts them where they belong.
    ///
    /// # Errors
    /// `Piece`, `Checksum`, and what `read` says.
    pub fn add_from<E: From<ParcelError>>(
        &mut self,
        piece: &Piece,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.admit(piece, if piece.data.is_empty() { piece.bytes as usize } else { 0 })?;
        let start = self.body.len();
        self.body.resize(start + piece.bytes as usize, 0);
        read(&mut self.body[start..])?;
        if crc32fast::hash(&self.body[start..]) != piece.crc32 {
            return Err(ParcelError::Checksum { offset: piece.offset }.into());
        }
        Ok(())
    }

    /// Whether a piece of so many bytes is the next one.
    fn admit(&self, piece: &Piece, bytes: usize) -> Result<(), ParcelError> {
        let expected = self.body.len() as u64;
        let limit = (self.bytes - self.body.len()).min(CHUNK_BYTES);
        if piece.offset != expected || bytes == 0 || bytes > limit {
            return Err(ParcelError::Piece { bytes, found: piece.offset, expected, limit });
        }
        Ok(())
    }

    /// The body.
    pub fn into_bytes(self) -> Vec<u8> {
        self.body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 2 * CHUNK_BYTES + 12;

    fn body() -> Bytes {
        Bytes::from((0..BYTES).map(|at| (at * 7) as u8).collect::<Vec<u8>>())
    }

    #[test]
    fn a_body_comes_back_byte_for_byte() {
        let mut into = PieceBox::new(BYTES);
        for piece in pieces(body()) {
            assert!(!into.is_whole());
            into.add(&piece).unwrap();
        }
        assert!(into.is_whole());
        assert_eq!(into.into_bytes(), body());
        let read = announced(head(Matter::Gather(3), &body()), |_| Some(BYTES as u64));
        assert_eq!(read, Ok((Matter::Gather(3), BYTES)));
    }

    #[test]
    fn bodies_of_another_size_are_refused_before_they_are_allocated() {
        let open = |bytes: u64, expected: Option<u64>| {
            let head = Head { body_bytes: bytes, matter: Some(Matter::Gather(0)) };
            announced(head, |_| expected)
        };
        assert_eq!(open(u64::MAX, Some(4)), Err(ParcelError::Size { found: u64::MAX, expected: 4 }));
        assert!(matches!(open(0, None), Err(ParcelError::Foreign(_))));
        let nothing = Head { body_bytes: 0, matter: None };
        assert_eq!(announced(nothing, |_| Some(0)), Err(ParcelError::NoMatter));
    }

    #[test]
    fn every_kind_of_foreign_piece_is_refused() {
        let all: Vec<Piece> = pieces(body()).collect();
        let spoiled = |spoil: fn(&mut Piece)| {
            let mut into = PieceBox::new(BYTES);
            into.add(&all[0]).unwrap();
            let mut piece = all[1].clone();
            spoil(&mut piece);
            into.add(&piece).unwrap_err()
        };
        assert!(matches!(spoiled(|piece| piece.crc32 ^= 1), ParcelError::Checksum { .. }));
        assert!(matches!(spoiled(|piece| piece.offset += 1), ParcelError::Piece { .. }));
        assert!(matches!(spoiled(|piece| piece.data = Bytes::new()), ParcelError::Piece { bytes: 0, .. }));
        let too_long = |piece: &mut Piece| piece.data = Bytes::from(vec![0; CHUNK_BYTES + 1]);
        assert!(matches!(spoiled(too_long), ParcelError::Piece { .. }));
        assert!(matches!(PieceBox::new(0).add(&all[0]), Err(ParcelError::Piece { limit: 0, .. })));
    }

    #[test]
    fn pieces_that_lie_elsewhere_are_read_there_and_checked_too() {
        let all: Vec<Piece> = pieces(body()).collect();
        let elsewhere = |piece: &Piece| Piece { bytes: piece.data.len() as u32, data: Bytes::new(), ..piece.clone() };
        let add = |into: &mut PieceBox, piece: &Piece, found: &[u8]| {
            into.add_from(piece, |bytes| {
                bytes.copy_from_slice(&found[..bytes.len()]);
                Ok::<_, ParcelError>(())
            })
        };
        let mut whole = PieceBox::new(BYTES);
        all.iter().for_each(|piece| add(&mut whole, &elsewhere(piece), &piece.data).unwrap());
        assert!(whole.is_whole() && whole.into_bytes() == body());
        let spoiled = |spoil: fn(&mut Piece)| {
            let mut into = PieceBox::new(BYTES);
            add(&mut into, &elsewhere(&all[0]), &all[0].data).unwrap();
            let mut piece = elsewhere(&all[1]);
            spoil(&mut piece);
            // Nothing that is too long is made room for.
            into.add_from(&piece, |bytes| {
                assert!(bytes.len() <= CHUNK_BYTES);
                bytes.copy_from_slice(&all[1].data[..bytes.len()]);
                Ok::<_, ParcelError>(())
            })
            .unwrap_err()
        };
        assert!(matches!(spoiled(|piece| piece.crc32 ^= 1), ParcelError::Checksum { .. }));
        assert!(matches!(spoiled(|piece| piece.offset += 1), ParcelError::Piece { .. }));
        assert!(matches!(spoiled(|piece| piece.bytes = 0), ParcelError::Piece { bytes: 0, .. }));
        assert!(matches!(spoiled(|piece| piece.data = Bytes::from_static(b"x")), ParcelError::Piece { .. }));
        assert!(matches!(spoiled(|piece| piece.bytes = u32::MAX), ParcelError::Piece { .. }));
    }
}
