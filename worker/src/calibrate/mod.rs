//! Statistics of the inputs of a group.

pub mod gram;
