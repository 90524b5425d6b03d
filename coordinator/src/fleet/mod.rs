//! The workers that are there, and calls out to them.

mod client;
mod roster;

pub use client::{CallError, GrpcWorkerClient, Help, UnitCall, WorkerClient};
pub use roster::{FleetEvent, Member, Offer, Pinned, Roster, RosterError};
