//! Entry point of `espalier-worker`.

use std::process::ExitCode;

fn main() -> ExitCode {
    espalier_worker::cli::main()
}
