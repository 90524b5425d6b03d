//! Ways to damage bytes.

use proptest::prelude::*;

/// One way to damage bytes.
#[derive(Debug, Clone)]
enum Damage {
    /// The rest is gone.
    Cut(prop::sample::Index),
    /// One bit is the other.
    Bit(prop::sample::Index, u8),
    /// One byte is another.
    Byte(prop::sample::Index, u8),
    /// Eight bytes are a number: where sizes stand, an absurd one.
    Number(prop::sample::Index, u64),
    /// Four or eight bytes are a number that is off by so much: where lengths and offsets stand, one that nearly fits.
    Nudge(prop::sample::Index, bool, i8),
    /// Something stands in between.
    Insert(prop::sample::Index, Vec<u8>),
    /// The rest is that of another good input.
    Splice(prop::sample::Index, prop::sample::Index, prop::sample::Index),
    /// Something is there twice.
    Twice(prop::sample::Index, prop::sample::Index),
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        if bytes.is_empty() {
            return;
        }
        match self {
            Self::Cut(at) => bytes.truncate(at.index(bytes.len())),
            Self::Bit(at, bit) => {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << (bit % 8);
            }
            Self::Nudge(at, is_long, by) => {
                let width = if *is_long { 8 } else { 4 };
                // Sizes mostly stand where their width divides.
                let at = at.index(bytes.len()) / 4 * 4;
                if let Some(field) = bytes.get_mut(at..at + width) {
                    let mut number = [0; 8];
                    number[..width].copy_from_slice(field);
                    let nudged = u64::from_le_bytes(number).wrapping_add_signed(i64::from(*by));
                    field.copy_from_slice(&nudged.to_le_bytes()[..width]);
                }
            }
            Self::Splice(at, other, from) => {
                let other = other.get(corpus);
                bytes.truncate(at.index(bytes.len()));
                bytes.extend_from_slice(&other[from.index(other.len().max(1)).min(other.len())..]);
            }
            Self::Byte(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Self::Number(at, number) => {
                let at = at.index(bytes.len());
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            Self::Insert(at, more) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, more.iter().copied());
            }
            Self::Twice(from, to) => {
                let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
                let piece = bytes[from.min(to)..from.max(to)].to_vec();
                bytes.splice(to..to, piece);
            }
        }
    }
}

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let place = any::<prop::sample::Index>;
    let edges = prop::sample::select(vec![0, 1, 7, 1 << 31, u64::from(u32::MAX), 1 << 40, i64::MAX as u64, u64::MAX]);
    let words = prop::sample::select(vec![
        "{",
        "}",
        "[",
        "]",
        "\"",
        ":",
        ",",
        "0",
        "-1",
        "1e999",
        "null",
        "\n",
        "[[",
        "\u{0}",
        "é",
        "9999999999999999999",
    ]);
    let one = prop_oneof![
        place().prop_map(Damage::Cut),
        (place(), any::<u8>()).prop_map(|(at, bit)| Damage::Bit(at, bit)),
        (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        (place(), any::<bool>(), any::<i8>()).prop_map(|(at, is_long, by)| Damage::Nudge(at, is_long, by)),
        (place(), place(), place()).prop_map(|(at, other, from)| Damage::Splice(at, other, from)),
        (place(), edges).prop_map(|(at, number)| Damage::Number(at, number)),
        (place(), words).prop_map(|(at, word)| Damage::Insert(at, word.as_bytes().to_vec())),
        (place(), prop::collection::vec(any::<u8>(), 1..16)).prop_map(|(at, more)| Damage::Insert(at, more)),
        (place(), place()).prop_map(|(from, to)| Damage::Twice(from, to)),
    ];
    prop::collection::vec(one, 1..6)
}

/// Bytes that are damaged, or that were never any good.
pub(super) fn foreign(corpus: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let noise = prop::collection::vec(any::<u8>(), 0..512);
    let damaged = (any::<prop::sample::Index>(), damage()).prop_map(move |(which, damage)| {
        let mut bytes = which.get(&corpus).clone();
        damage.iter().for_each(|damage| damage.apply(&mut bytes, &corpus));
        bytes
    });
    prop_oneof![
        6 => damaged,
        1 => noise,
    ]
}
