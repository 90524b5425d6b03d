//! C that the tests need: it goes where Rust would need `unsafe`, and is compiled once for each version of it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use espalier_common::digest::Digest;

use crate::process::target_folder;

/// The path of `source`, compiled with `arguments`.
///
/// # Errors
/// If there is no C compiler, or it refuses.
pub(crate) fn compiled(name: &str, source: &str, arguments: &[&str]) -> Result<PathBuf> {
    let digest = Digest::of(source.as_bytes()).to_string();
    let path = target_folder().join(format!("{name}-{}", &digest[..16]));
    if path.is_file() {
        return Ok(path);
    }
    // Several tests may do this at once; each renames a whole file into place.
    let folder = tempfile::tempdir_in(target_folder())?;
    let (text, made) = (folder.path().join("source.c"), folder.path().join("made"));
    fs::write(&text, source)?;
    let output = Command::new("cc")
        .args(["-O2", "-Wall", "-Wextra", "-o"])
        .args([&made, &text])
        .args(arguments)
        .output()
        .context("tests of faults need a C compiler, `cc`")?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&made, &path)?;
    Ok(path)
}
