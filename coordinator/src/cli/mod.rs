//! What a person types: argv → configuration → run → a table and an exit code.

mod args;
mod cluster;
mod configuration;
mod eval;
mod export;
mod inspect;
mod job;
mod kept;
mod local;
mod plan;
mod prune;
mod render;
mod screen;
mod table;
mod terminal;
mod verify;
mod watch;

use std::process::ExitCode;

use clap::Parser;
use espalier_common::config::Overrides;
use espalier_common::telemetry::{self, LogConfig, LogFormat};

use crate::error::{RunError, exit};
use args::{Cli, Command, ConfigCommand, RenderCommand, StatusArgs};

/// Why a command ended badly: one line, and an exit code.
#[derive(Debug)]
pub(crate) struct CliError {
    pub(crate) message: String,
    pub(crate) code: u8,
}

impl CliError {
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: exit::USAGE }
    }

    pub(crate) fn rejected(error: &dyn std::error::Error) -> Self {
        let fault = espalier_common::fault::Fault::new(espalier_common::fault::FaultClass::Reject, error);
        Self { message: fault.message, code: exit::REJECTED }
    }
}

impl From<RunError> for CliError {
    fn from(error: RunError) -> Self {
        Self { message: error.one_line(), code: error.exit_code() }
    }
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen::error_line(&error.message);
            ExitCode::from(error.code)
        }
    }
}

/// What the flags say of the log, over a configuration.
fn log_flags(cli: &Cli) -> Overrides {
    let format = cli.log_format.map(|format| match format {
        LogFormat::Text => "text",
        LogFormat::Json => "json",
    });
    Overrides::default().set("log.format", format).set("log.filter", cli.log.clone())
}

fn run(cli: Cli) -> Result<(), CliError> {
    // A coordinator's log is configured where everything else about it is.
    let log_flags = log_flags(&cli);
    let served = match &cli.command {
        Command::Coordinator(args) => Some(cluster::config(args, log_flags.clone())?),
        _ => None,
    };
    let log = served.as_ref().map_or_else(
        || LogConfig {
            format: cli.log_format.unwrap_or_default(),
            filter: cli.log.clone().unwrap_or_else(|| "error".to_owned()),
        },
        |config| config.log.clone(),
    );
    telemetry::init(&log).map_err(|error| match cli.log {
        None => CliError::rejected(&error),
        Some(_) => CliError::usage(error.to_string()),
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // It waits, writes and hashes; the computing is done by workers.
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| CliError { message: format!("cannot start: {error}"), code: exit::BUG })?;
    runtime.block_on(async {
        match cli.command {
            Command::Prune(args) => prune::run(args, cli.json).await,
            Command::Eval(args) => eval::run(args, cli.json).await,
            Command::Verify(args) => verify::run(&args, cli.json).await,
            Command::Export(args) => export::run(&args, cli.json),
            Command::Inspect(args) => inspect::run(&args, cli.json),
            Command::Report(args) => prune::report(&args, cli.json),
            Command::Resume(args) => prune::resume(args, cli.json).await,
            Command::Plan(args) => plan::run(*args, cli.json).await,
            Command::Config { what: ConfigCommand::Show(flags) } => configuration::show(&flags, log_flags, cli.json),
            Command::Config { what: ConfigCommand::Keys } => {
                configuration::keys(cli.json);
                Ok(())
            }
            Command::Render { what: RenderCommand::K8s(args) } => render::kubernetes(*args, cli.json).await,
            Command::Coordinator(args) => {
                let config = served.expect("it was loaded for this very command");
                Box::pin(cluster::serve(args, config, cli.json)).await
            }
            Command::Status(StatusArgs { run, watch: true, remote }) => watch::run(run, remote, cli.json).await,
            Command::Status(StatusArgs { run: Some(run), .. }) => kept::status(&run, cli.json),
            Command::Status(StatusArgs { remote, .. }) => cluster::status(remote, cli.json).await,
            Command::Cancel(args) if args.run.contains('/') => kept::cancel(&args.run),
            Command::Cancel(args) => cluster::cancel(args).await,
        }
    })
}
