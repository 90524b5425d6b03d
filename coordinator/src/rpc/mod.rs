//! Calls in (and, for the command line, out): decode, hand on, encode. No logic here; conversions are in
//! `espalier_common::wire`.

pub mod admin;
pub mod client;
pub mod service;
pub mod workers;
