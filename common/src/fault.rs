//! What an error becomes at a process boundary: a class that the scheduler acts on and a message for people.

use serde::{Deserialize, Serialize};

/// Whether trying again can help. The scheduler reads the class, never the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultClass {
    /// Transient: the same worker may try again.
    RetryHere,
    /// This worker cannot do it; another may.
    RetryElsewhere,
    /// The job or its input is wrong: nobody can do it.
    Reject,
    /// A broken invariant of Espalier.
    Bug,
}

/// An error that crossed a process boundary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What may be done about it.
    pub class: FaultClass,
    /// One line for people: what failed, with the file, tensor or key.
    pub message: String,
}

impl Fault {
    /// Makes a fault of `class` out of an error and all its sources, in one line.
    pub fn new(class: FaultClass, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            source = cause.source();
        }
        Self { class, message: message.replace('\n', " ") }
    }
}
