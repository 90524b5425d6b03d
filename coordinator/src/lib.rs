//! Espalier's coordinator and command line: it decides; workers compute; the journal remembers.
//!
//! In reading order: [`schedule`] and [`plan`] decide and are pure; [`driver`] carries out; [`journal`] remembers; [`run`]
//! is one run from job to report; [`fleet`] calls out and [`rpc`] is called; [`view`] is a run as people see it, which
//! [`http`] serves and [`page`] freezes; [`cli`] is what a person types.

pub mod assemble;
pub mod calibration;
pub mod cli;
pub mod config;
pub mod desk;
pub mod driver;
pub mod error;
pub mod evaluate;
pub mod events;
pub mod fingerprint;
pub mod fleet;
pub mod http;
pub mod inspect;
pub mod journal;
pub mod layout;
pub mod local;
pub mod manifest;
pub mod metrics;
pub mod page;
pub mod plan;
mod preflight;
pub mod report;
pub mod rpc;
pub mod run;
pub mod schedule;
pub mod trace;
pub mod verify;
pub mod view;
