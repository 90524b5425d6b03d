//! Espalier's coordinator.

pub mod inspect;
