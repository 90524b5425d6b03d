//! What the integration tests stand on: the real binaries, the bundled data, and ways to compare and to damage
//! checkpoints.

pub mod authority;
pub mod checkpoint;
pub mod collector;
mod compiled;
pub mod fault;
pub mod http;
pub mod network;
pub mod process;
pub mod s3;

use std::path::{Path, PathBuf};

/// The folder of bundled test data.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")
}

/// The root of the source tree.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Names of the bundled tiny models, one a family.
pub const TINY_MODELS: [&str; 3] = ["llama-tiny", "opt-tiny", "qwen2-tiny"];

/// The folder of a bundled tiny model.
pub fn tiny(model: &str) -> PathBuf {
    golden().join("tiny").join(model)
}
