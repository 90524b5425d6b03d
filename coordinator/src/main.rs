//! Entry point of `espalier`.

use std::process::ExitCode;

fn main() -> ExitCode {
    espalier_coordinator::cli::main()
}
