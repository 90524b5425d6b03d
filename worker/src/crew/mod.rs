//! One layer shared by several workers, in a chain where only one could work otherwise.
//!
//! The layer's owner has everything: the input, the statistics, the artifact. It lends a share of the calibration sequences
//! to each assistant, asks for the sums over it, and for blocks of rows to be solved. An assistant keeps nothing beyond the
//! stream that it is called on ([`assistant`]); with the strategy `data` it keeps its share of the hidden states, so that none
//! travel ([`crate::keeping`]). If it dies, errs or is slow, the owner ([`owner`]) does its part itself, and the
//! bits are the same: sums go up a fixed tree ([`crate::calibrate::tree`]), and blocks are cut by the solver alone.

pub mod assistant;
mod board;
mod finish;
mod gathering;
mod groundwork;
mod input;
mod measurements;
mod measuring;
mod order;
pub mod owner;
mod paces;
mod share;
mod sizes;
mod solving;
mod statistics;
mod waiting;

pub(crate) use gathering::Gathered;
pub(crate) use groundwork::Laying;
pub(crate) use input::Input;
pub(crate) use owner::Crew;
pub use paces::Paces;
pub(crate) use share::gather_leaves;
pub use sizes::LayerSizes;
