//! Calls in: decode, hand on, encode. No logic here; conversions are in `espalier_common::wire`.

pub mod admin;
pub mod workers;
