//! The command line: `serve`, `methods`, `check`.

use std::io::Write as _;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use espalier_common::config::{self, ConfigError, ENV_PREFIX, Overrides, Setting};
use espalier_common::device::DeviceChoice;
use espalier_common::fault::FaultClass;
use espalier_common::job::JobSpec;
use espalier_common::telemetry;
use espalier_gate::{AuthSection, GateError, HttpSection, TlsSection};

use crate::config::WorkerConfig;
use crate::device;
use crate::prune::{self, METHODS};
use crate::run::{self, RunError};
use crate::serve::{self, ServeError};

/// Espalier's worker: runs calibration data through decoder layers and prunes them.
#[derive(Debug, Parser)]
#[command(name = "espalier-worker", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Works for a coordinator until told to stop (the default).
    Serve(ServeArgs),
    /// Lists the pruning methods with their parameters and defaults.
    Methods {
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Shows what a worker is configured with.
    Config {
        /// What to show.
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// Says what this build can compute on here.
    Devices {
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Validates a job file without reading the model.
    Check {
        /// The job.
        job: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Shows every key with its value and where that is from: default, file, environment, flag.
    Show {
        #[command(flatten)]
        flags: Box<ServeArgs>,
        /// One JSON document instead of text.
        #[arg(long)]
        json: bool,
    },
    /// Lists every key with its meaning and default.
    Keys {
        /// As a JSON schema.
        #[arg(long)]
        json: bool,
    },
}

/// Flags of `serve`; each overrides the key of the same name in the configuration.
#[derive(Debug, Default, Args)]
struct ServeArgs {
    /// Configuration file (TOML, YAML or JSON).
    #[arg(long)]
    config: Option<PathBuf>,
    /// URL of the coordinator.
    #[arg(long)]
    coordinator: Option<String>,
    /// Where the worker's own services listen; port 0 takes a free one.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// How others reach them: a host that the worker's certificate names, or host:port.
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Folder with ca.crt, tls.crt and tls.key.
    #[arg(long, value_name = "DIR")]
    tls_folder: Option<PathBuf>,
    /// Compute threads.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    threads: Option<u32>,
    /// What computes: auto, cpu, or cuda:N.
    #[arg(long)]
    device: Option<DeviceChoice>,
    /// Bytes of hidden states kept in memory; the rest goes to the scratch folder.
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<u64>,
    /// Workers on this machine, this one included: they share the memory that is not given in bytes.
    #[arg(long, value_name = "COUNT")]
    workers_here: Option<NonZeroU32>,
    /// Folder for hidden states that do not fit in memory.
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// A name for people.
    #[arg(long)]
    name: Option<String>,
    /// How log lines look: text or json.
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<telemetry::LogFormat>,
    /// Ends when standard input does: for a launcher whose children must not outlive it.
    #[arg(long)]
    exit_with_stdin: bool,
    /// Stays on this machine, without TLS, whatever the configuration says: for a launcher on the same machine.
    #[arg(long, conflicts_with_all = ["advertise", "tls_folder"])]
    local: bool,
}

/// Parses the arguments of this process and does what they say.
pub fn main() -> ExitCode {
    device::keep_freed_memory();
    let cli = Cli::parse();
    let command = cli.command.unwrap_or(Command::Serve(cli.serve));
    let lists = matches!(command, Command::Methods { .. } | Command::Devices { .. } | Command::Config { .. });
    let done = match command {
        Command::Serve(args) => run_worker(args),
        Command::Methods { json } => list_methods(json),
        Command::Config { what: ConfigCommand::Show { flags, json } } => show_config(&flags, json),
        Command::Config { what: ConfigCommand::Keys { json } } => list_keys(json),
        Command::Devices { json } => list_devices(json),
        Command::Check { job } => check_job(&job),
    };
    let Err(error) = done else { return ExitCode::SUCCESS };
    // A reader of what is listed that went away (`| head`) is no error.
    if lists && error.root_cause().downcast_ref::<std::io::Error>().is_some_and(is_broken_pipe) {
        return ExitCode::SUCCESS;
    }
    // Nowhere is left to complain if standard error is gone.
    let _ = writeln!(std::io::stderr(), "error: {}", format!("{error:#}").replace('\n', " "));
    ExitCode::from(exit_code(&error))
}

fn is_broken_pipe(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::BrokenPipe
}

/// 65: the input is wrong; 70: a bug; 75: interrupted, or the cluster is lost.
fn exit_code(error: &anyhow::Error) -> u8 {
    let class = error.chain().find_map(|cause| {
        let config = cause.downcast_ref::<ConfigError>().map(ConfigError::class);
        let run = || cause.downcast_ref::<RunError>().map(RunError::class);
        let serve = || cause.downcast_ref::<ServeError>().map(ServeError::class);
        let gate = || cause.downcast_ref::<GateError>().map(GateError::class);
        config.or_else(run).or_else(serve).or_else(gate)
    });
    match class {
        Some(FaultClass::Reject) => 65,
        Some(FaultClass::RetryHere | FaultClass::RetryElsewhere) => 75,
        Some(FaultClass::Bug) | None => 70,
    }
}

/// What the flags say, over everything else.
fn overrides(args: &ServeArgs) -> Overrides {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let log_format = args.log_format.map(|format| match format {
        telemetry::LogFormat::Text => "text",
        telemetry::LogFormat::Json => "json",
    });
    Overrides::default()
        .set("worker.coordinator", args.coordinator.clone())
        .set("worker.listen", args.listen.map(|listen| listen.to_string()))
        .set("worker.advertise", args.advertise.clone())
        .set("tls.folder", path(&args.tls_folder))
        .set("worker.threads", args.threads)
        .set("worker.device", args.device.map(|device| device.to_string()))
        .set("worker.memory_budget", args.memory_budget)
        .set("worker.workers_here", args.workers_here.map(NonZeroU32::get))
        .set("worker.scratch", path(&args.scratch))
        .set("worker.name", args.name.clone())
        .set("log.format", log_format)
}

fn run_worker(args: ServeArgs) -> anyhow::Result<()> {
    let mut config: WorkerConfig = config::load(args.config.as_deref(), ENV_PREFIX, overrides(&args))?;
    // Before what follows: a launcher on this machine may send its spans to another.
    let collector = config.collector()?;
    if args.local {
        config.tls = TlsSection::default();
        config.auth = AuthSection::default();
        // Several workers of one machine cannot share a port; their coordinator tells of them.
        config.http = HttpSection::default();
        config.worker.advertise = None;
    }
    telemetry::init(&config.log)
        .map_err(|error| ConfigError::Invalid { origin: "configuration".to_owned(), reason: error.to_string() })?;
    serve::run(&config, collector, args.exit_with_stdin)?;
    Ok(())
}

fn show_config(args: &ServeArgs, json: bool) -> anyhow::Result<()> {
    let (_, settings) = config::explain::<WorkerConfig>(args.config.as_deref(), ENV_PREFIX, overrides(args))?;
    let mut out = std::io::stdout().lock();
    if json {
        let keys: serde_json::Map<_, _> = settings
            .iter()
            .map(|setting| {
                (setting.key.clone(), serde_json::json!({ "value": setting.value, "origin": setting.origin }))
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&keys)?)?;
        return Ok(());
    }
    let widest = |length: fn(&Setting) -> usize| settings.iter().map(length).max().unwrap_or_default();
    let (keys, values) = (widest(|setting| setting.key.len()), widest(|setting| setting.text().len()));
    for setting in &settings {
        writeln!(out, "{:keys$}  {:values$}  {}", setting.key, setting.text(), setting.origin)?;
    }
    Ok(())
}

fn list_keys(json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&schemars::schema_for!(WorkerConfig))?)?,
        false => writeln!(out, "{}", config::reference::<WorkerConfig>().trim())?,
    }
    Ok(())
}

fn list_methods(json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut document = Vec::new();
    for method in METHODS {
        let (_, params) = prune::build(method.name, &serde_json::Value::Null).map_err(RunError::from)?;
        if json {
            let (name, version, summary) = (method.name, method.version, method.summary);
            let entry = serde_json::json!({ "name": name, "version": version, "summary": summary, "params": params });
            document.push(entry);
            continue;
        }
        writeln!(out, "{} ({})\n    {}", method.name, method.version, method.summary)?;
        for (key, value) in params.as_object().into_iter().flatten() {
            writeln!(out, "    {key} = {value}")?;
        }
    }
    if json {
        writeln!(out, "{}", serde_json::Value::Array(document))?;
    }
    Ok(())
}

fn list_devices(json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let devices = device::devices();
    if json {
        writeln!(out, "{}", serde_json::to_string(&devices)?)?;
        return Ok(());
    }
    writeln!(out, "cpu ({})", device::memory::instruction_set())?;
    for (number, gpu) in devices.gpus.iter().enumerate() {
        let gigabytes = gpu.memory_bytes as f64 / 1e9;
        writeln!(out, "cuda:{number} ({}, {}, {gigabytes:.0} GB)", gpu.name, gpu.architecture)?;
    }
    if let Some(absent) = devices.absent {
        writeln!(out, "no GPU: {absent}")?;
    }
    Ok(())
}

fn check_job(path: &Path) -> anyhow::Result<()> {
    let job: JobSpec = config::load_document(path)?;
    let place = || path.display().to_string();
    job.validate().map_err(RunError::from).with_context(place)?;
    let method = run::build_method(&job).with_context(place)?;
    let pattern = run::pattern(&job, &*method.solver)?;
    let (name, params) = (&job.method.name, method.params);
    writeln!(std::io::stdout(), "{} is a valid job: {name} to {pattern} with {params}", place())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serve_is_the_default_command() {
        let cli = Cli::try_parse_from(["espalier-worker", "--threads", "2"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(cli.serve.threads, Some(2));
        let cli = Cli::try_parse_from(["espalier-worker", "serve", "--name", "x"]).unwrap();
        assert!(matches!(cli.command, Some(Command::Serve(args)) if args.name.as_deref() == Some("x")));
    }

    #[test]
    fn only_loopback_is_listened_on_without_tls() {
        let mut config = WorkerConfig::default();
        config.worker.coordinator = Some("http://127.0.0.1:1".to_owned());
        config.worker.listen = "0.0.0.0:0".parse().unwrap();
        let error = serve::run(&config, None, false).unwrap_err();
        assert!(error.to_string().contains("worker.listen is 0.0.0.0:0"), "{error}");
        assert_eq!(exit_code(&error.into()), 65);
    }

    #[test]
    fn a_wrong_job_exits_with_65_and_names_the_nearest_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        let job = "[model]\nsource = \"m\"\n[calibration]\nsource = \"c\"\n[output]\nuri = \"o\"\n[pattern]\n";
        for (line, named) in [("sparsty = 0.5", "did you mean sparsity?"), ("sparsity = 1.5", "1.5")] {
            std::fs::write(&path, format!("{job}{line}\n")).unwrap();
            let error = check_job(&path).unwrap_err();
            assert!(format!("{error:#}").contains(named), "{error:#}");
            assert_eq!(exit_code(&error), 65);
        }
        std::fs::write(&path, format!("{job}[method]\nname = \"wandaa\"\n")).unwrap();
        let error = check_job(&path).unwrap_err();
        assert!(format!("{error:#}").contains("wanda, "), "{error:#}");
    }
}
