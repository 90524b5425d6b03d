//! Data on its way through layers, and what is measured of it.

pub mod evaluate;
