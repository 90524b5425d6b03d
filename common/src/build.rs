//! Which builds compute the same bits.

/// Espalier's version, and after the `+` how often forward passes or the sums over their inputs have since come to round
/// otherwise: the size of a tile, the order of a sum. Workers of another build are not let in, and a run is not taken up by one.
/// Methods count what they change for themselves.
pub const BUILD: &str = concat!(env!("CARGO_PKG_VERSION"), "+", "3");
