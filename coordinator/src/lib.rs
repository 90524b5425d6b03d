//! Espalier's coordinator.
