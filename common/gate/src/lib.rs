//! Who may come in, and how processes of Espalier reach each other. Both programs stand behind it; it knows nothing of jobs.
//!
//! In reading order: [`settings`] says what a person configures, [`role`] who may call what, [`certificate`] who a peer is,
//! [`credentials`] and [`tokens`] are files that are read again when they change; [`incoming`] accepts connections, [`guard`]
//! lets calls through, [`web`] serves pages and probes, [`dial`] connects, and [`trace`] tells a collector what took how long.
//! Without `[tls]`, everything stays on loopback.

pub mod certificate;
pub mod credentials;
pub mod dial;
mod error;
mod file;
pub mod guard;
#[cfg(test)]
mod handshake_tests;
pub mod incoming;
pub mod role;
mod secret;
pub mod settings;
mod stream;
pub mod tokens;
pub mod trace;
pub mod web;

pub use credentials::Credentials;
pub use dial::{DialError, Dialer};
pub use error::GateError;
pub use guard::Guard;
pub use incoming::Entrance;
pub use role::Role;
pub use secret::Secret;
pub use settings::{AuthSection, HttpSection, TlsSection, TraceSection};
pub use tokens::Tokens;
pub use trace::Tracer;
pub use web::Web;
