//! The arguments.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use espalier_common::device::DeviceChoice;
use espalier_common::job::{Allocation, Layout, Propagation};
use espalier_common::structure::AttentionUnit;
use espalier_common::telemetry::LogFormat;

use crate::plan::strategy::Asked;

/// Prunes large language models across a cluster, or on this machine.
#[derive(Debug, Parser)]
#[command(name = "espalier", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Print one JSON document on stdout instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// How log lines look: text or json [default: text, or as [log] of --config says].
    #[arg(long, global = true)]
    pub(crate) log_format: Option<LogFormat>,
    /// What is logged, in tracing's filter syntax.
    #[arg(long, global = true)]
    pub(crate) log: Option<String>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Prune a model: on this machine, or on a cluster with --coordinator.
    Prune(Box<PruneArgs>),
    /// Measure perplexity (SparseGPT's and Wanda's protocol).
    Eval(EvalArgs),
    /// Count zeros and N:M groups of a checkpoint, and compare it with another.
    Inspect(InspectArgs),
    /// Say what a job would take on a cluster: time, memory, bytes moved; from the model's headers alone.
    Plan(Box<PlanArgs>),
    /// Write what a job is on a cluster's own scheduler.
    Render {
        /// For which.
        #[command(subcommand)]
        what: RenderCommand,
    },
    /// Say whether stock loaders will take a checkpoint, and if not why.
    Verify(VerifyArgs),
    /// Write a structured result in another layout.
    Export(ExportArgs),
    /// Serve a cluster, or run one job on one.
    Coordinator(CoordinatorArgs),
    /// Show what a coordinator is configured with. `espalier-worker config` does the same for workers.
    Config {
        /// What to show.
        #[command(subcommand)]
        what: ConfigCommand,
    },
    /// Show the runs and workers of a coordinator, or how far one run is.
    Status(StatusArgs),
    /// Stop a run of a coordinator, or one on an object store wherever its coordinator is.
    Cancel(CancelArgs),
    /// Take up a run that was interrupted, on this machine.
    Resume(ResumeArgs),
    /// Print the report of a run again, from its journal alone.
    Report(ReportArgs),
}

/// Which inputs a layer is calibrated with.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum PropagationArg {
    /// Those its pruned predecessors give.
    Pruned,
    /// Those the dense model gives.
    Dense,
}

impl From<PropagationArg> for Propagation {
    fn from(argument: PropagationArg) -> Self {
        match argument {
            PropagationArg::Pruned => Self::Pruned,
            PropagationArg::Dense => Self::Dense,
        }
    }
}

/// How workers share the calibration; no byte of the result depends on it.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum StrategyArg {
    /// The owner of a layer lends shares of its input.
    Layers,
    /// Each worker keeps its share of the sequences from layer to layer, so that no hidden states travel.
    Data,
    /// Whichever is predicted to cost less.
    Auto,
}

impl From<StrategyArg> for Asked {
    fn from(argument: StrategyArg) -> Self {
        match argument {
            StrategyArg::Layers => Self::Layers,
            StrategyArg::Data => Self::Data,
            StrategyArg::Auto => Self::Auto,
        }
    }
}

/// What the checkpoint of a structured result looks like.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LayoutArg {
    /// Full shapes, with zeros: loads wherever the dense model does.
    Masked,
    /// Narrower tensors, all layers alike: loads in stock transformers and vLLM.
    Uniform,
    /// As narrow as the widest layer, the others filled up with zeros: loads where uniform does.
    Padded,
    /// Each layer as narrow as it is (DeciLM's block_configs): loads in llama.cpp; transformers and vLLM want NVIDIA's config class.
    NemotronNas,
}

/// What goes of attention at a time.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AttentionArg {
    /// A KV head with all its query heads.
    KvHeads,
    /// Query heads, as many of each KV head.
    QueryHeads,
    /// Channels of v and o, as many of each KV head; needs --layout masked.
    Channels,
}

impl From<AttentionArg> for AttentionUnit {
    fn from(argument: AttentionArg) -> Self {
        match argument {
            AttentionArg::KvHeads => Self::KvHeads,
            AttentionArg::QueryHeads => Self::QueryHeads,
            AttentionArg::Channels => Self::Channels,
        }
    }
}

impl From<LayoutArg> for Layout {
    fn from(argument: LayoutArg) -> Self {
        match argument {
            LayoutArg::Masked => Self::Masked,
            LayoutArg::Uniform => Self::Uniform,
            LayoutArg::Padded => Self::Padded,
            LayoutArg::NemotronNas => Self::NemotronNas,
        }
    }
}

/// How sparsity is spread over layers.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AllocationArg {
    /// The same in every layer.
    Uniform,
    /// More in later layers, by SlimGPT's logarithm.
    Log,
    /// Less in layers with many outlying weights (OWL).
    Owl,
    /// Where measured error curves say that it costs least.
    Measured,
}

impl From<AllocationArg> for Allocation {
    fn from(argument: AllocationArg) -> Self {
        match argument {
            AllocationArg::Uniform => Self::Uniform,
            AllocationArg::Log => Self::Log,
            AllocationArg::Owl => Self::Owl,
            AllocationArg::Measured => Self::Measured,
        }
    }
}

/// Arguments of `prune`. Whatever is also in a job file overrides it.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// A Hugging Face directory, a GGUF file, or hf://org/name[@revision].
    pub(crate) model: Option<String>,
    /// Where the checkpoint goes: a directory that does not exist yet or is empty.
    #[arg(long, short)]
    pub(crate) output: Option<String>,
    /// The method; `espalier-worker methods` lists them.
    #[arg(long)]
    pub(crate) method: Option<String>,
    /// Methods that keep the zeros of another checkpoint (refit): that checkpoint, named like MODEL.
    #[arg(long, value_name = "MODEL")]
    pub(crate) mask: Option<String>,
    /// Share of zeros, in [0, 1); for structured methods, share of the layers' parameters that goes.
    #[arg(long, conflicts_with = "pattern", allow_negative_numbers = true)]
    pub(crate) sparsity: Option<f64>,
    /// N:M, e.g. 2:4: 2 kept of every 4.
    #[arg(long)]
    pub(crate) pattern: Option<String>,
    /// Structured methods: the checkpoint's shape [default: uniform].
    #[arg(long)]
    pub(crate) layout: Option<LayoutArg>,
    /// Structured methods: channels that stay are a multiple of this [default: 8].
    #[arg(long, value_parser = positive)]
    pub(crate) round_to: Option<usize>,
    /// Structured methods: KV heads that every layer loses, with their query heads [default: by the share].
    #[arg(long)]
    pub(crate) kv_heads: Option<usize>,
    /// Structured methods: what goes of attention at a time [default: kv-heads].
    #[arg(long)]
    pub(crate) attention: Option<AttentionArg>,
    /// Structured methods: what stays can be split over this many devices [default: 1].
    #[arg(long, value_parser = positive)]
    pub(crate) tensor_parallel: Option<usize>,
    /// How sparsity is spread over layers [default: uniform].
    #[arg(long)]
    pub(crate) allocation: Option<AllocationArg>,
    /// A text file, or a .jsonl with `text` or `input_ids`.
    #[arg(long)]
    pub(crate) calibration: Option<String>,
    /// Number of calibration sequences [default: 128].
    #[arg(long)]
    pub(crate) samples: Option<usize>,
    /// Tokens in each [default: 2048].
    #[arg(long)]
    pub(crate) seq_len: Option<usize>,
    /// Chooses the calibration windows [default: 0].
    #[arg(long)]
    pub(crate) seed: Option<u64>,
    /// Share of the calibration sequences that is kept out of solving [default: 0.125 for espalier, 0 for others].
    #[arg(long)]
    pub(crate) held_out: Option<f64>,
    /// Which inputs a layer sees [default: pruned].
    #[arg(long)]
    pub(crate) propagation: Option<PropagationArg>,
    /// How workers share the calibration [default: layers, or as configured].
    #[arg(long)]
    pub(crate) strategy: Option<StrategyArg>,
    /// Largest shard, e.g. 5GB or 512MiB [default: 5GB].
    #[arg(long)]
    pub(crate) shard_size: Option<String>,
    /// A parameter of the method, e.g. --set method.damping=0.02.
    #[arg(long = "set", value_name = "method.KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// A job file; flags override it.
    #[arg(long)]
    pub(crate) job: Option<PathBuf>,
    /// Also measure perplexity before and after, on this text.
    #[arg(long, value_name = "SRC")]
    pub(crate) eval: Option<String>,
    /// Tokens in each evaluation window [default: 2048].
    #[arg(long, value_parser = positive)]
    pub(crate) eval_seq_len: Option<usize>,
    /// At most this many evaluation windows.
    #[arg(long, value_parser = positive)]
    pub(crate) eval_max_windows: Option<usize>,
    /// Where the run keeps its journal and artifacts: a folder, or an s3://, gs:// or az:// URL [default: OUTPUT.run].
    #[arg(long, value_name = "RUN")]
    pub(crate) run: Option<String>,
    #[command(flatten)]
    pub(crate) local: LocalArgs,
    /// Serve the page of this run here while it goes on, on loopback only, e.g. 127.0.0.1:8080.
    #[arg(long, value_name = "ADDR", conflicts_with = "coordinator")]
    pub(crate) http: Option<SocketAddr>,
    /// Submit to this coordinator instead of running here, and follow.
    #[arg(long, value_name = "URL")]
    pub(crate) coordinator: Option<String>,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
}

/// How this command proves to a coordinator who it is, and whom it believes. Each flag overrides the environment, where
/// they are ESPALIER__TLS__FOLDER and so on, and ESPALIER__CLIENT__TOKEN_FILE.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Coordinator at an https:// URL")]
pub(crate) struct AccessArgs {
    /// Folder with ca.crt, tls.crt and tls.key.
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_folder: Option<PathBuf>,
    /// Authority that the coordinator's certificate is checked against.
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// This command's certificate.
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_certificate: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// File with a token to show instead of a certificate.
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
}

/// Arguments of `plan`: those of `prune`, of which only the model is needed, and the cluster.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) prune: PruneArgs,
    /// The machines: [[workers]] with name, count, memory, gflops and machine_gflops, and [network], [storage], [solver].
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster: PathBuf,
}

/// Workers on this machine.
#[derive(Debug, Clone, Args)]
pub(crate) struct LocalArgs {
    /// Worker processes on this machine.
    #[arg(long, default_value_t = 1, value_parser = positive)]
    pub(crate) workers: usize,
    /// Compute threads, divided among the workers [default: as many as the machine has].
    #[arg(long, value_parser = positive)]
    pub(crate) threads: Option<usize>,
    /// What the workers compute on: auto takes GPUs where there are any and the CUDA build of the worker, else the CPU; cpu;
    /// or cuda:N.
    #[arg(long, value_name = "DEVICE", default_value_t)]
    pub(crate) device: DeviceChoice,
}

fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err(format!("`{text}` is no number")),
    }
}

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// The model.
    pub(crate) model: String,
    /// A text file, read as it is, or a .jsonl.
    #[arg(long, value_name = "SRC")]
    pub(crate) text: String,
    /// Tokens in each window.
    #[arg(long, default_value_t = 2048)]
    pub(crate) seq_len: usize,
    /// At most this many windows.
    #[arg(long, value_parser = positive)]
    pub(crate) max_windows: Option<usize>,
    /// Evaluate this model on the same windows too. With --bench, each model takes two passes in turn, and the ratio of their
    /// times is reported.
    #[arg(long, value_name = "DENSE")]
    pub(crate) against: Option<String>,
    /// Also report tokens per second and peak memory of the forward passes.
    #[arg(long)]
    pub(crate) bench: bool,
    #[command(flatten)]
    pub(crate) local: LocalArgs,
}

/// Arguments of `inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// The checkpoint.
    pub(crate) model: String,
    /// Compare with this one.
    #[arg(long, value_name = "DENSE")]
    pub(crate) against: Option<String>,
}

/// Schedulers that jobs are rendered for.
#[derive(Debug, Subcommand)]
pub(crate) enum RenderCommand {
    /// Kubernetes manifests, with sizes from the job's plan.
    K8s(Box<K8sArgs>),
}

/// As what the pods are run.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum FormArg {
    /// A JobSet, which needs its controller.
    Jobset,
    /// Two Indexed Jobs and a headless Service.
    Jobs,
}

/// Arguments of `render k8s`.
#[derive(Debug, Args)]
pub(crate) struct K8sArgs {
    /// The job file. Its places are URLs, or with --claim paths below /data.
    pub(crate) job: PathBuf,
    /// As what the pods are run.
    #[arg(long = "as", value_name = "FORM", default_value = "jobset")]
    pub(crate) form: FormArg,
    /// Names everything.
    #[arg(long, default_value = "espalier")]
    pub(crate) name: String,
    /// Where it goes.
    #[arg(long, default_value = "espalier")]
    pub(crate) namespace: String,
    /// Workers [default: as many as the cluster has, or 1].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) workers: Option<u32>,
    /// The machines, as for `plan`: each worker gets the memory of the smallest.
    #[arg(long, value_name = "FILE")]
    pub(crate) cluster: Option<PathBuf>,
    /// Memory of a worker, e.g. 64GiB [default: as the job's plan says, for which the model is looked at].
    #[arg(long, value_name = "SIZE", conflicts_with = "cluster")]
    pub(crate) worker_memory: Option<String>,
    /// Processors of a worker.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) worker_cpus: u32,
    /// Give each worker an NVIDIA GPU of its own.
    #[arg(long)]
    pub(crate) gpu: bool,
    /// Image of the coordinator [default: espalier-coordinator of this version].
    #[arg(long, value_name = "IMAGE")]
    pub(crate) coordinator_image: Option<String>,
    /// Image of the workers [default: espalier-worker of this version; with --gpu, the one for GPUs].
    #[arg(long, value_name = "IMAGE")]
    pub(crate) worker_image: Option<String>,
    /// A PersistentVolumeClaim, ReadWriteMany, that all pods mount at /data.
    #[arg(long, value_name = "NAME")]
    pub(crate) claim: Option<String>,
    /// Where the run keeps its journal and artifacts [default: OUTPUT.run].
    #[arg(long, value_name = "RUN")]
    pub(crate) run: Option<String>,
    /// A variable that says where the store is, e.g. AWS_REGION=eu-central-1; no secrets.
    #[arg(long, value_name = "NAME=VALUE")]
    pub(crate) environment: Vec<String>,
    /// The store knows the pods by themselves: no credentials are read from the secret espalier-store.
    #[arg(long)]
    pub(crate) own_identity: bool,
    /// Wait in this queue of Kueue.
    #[arg(long, value_name = "NAME")]
    pub(crate) queue: Option<String>,
    /// Also write what Prometheus' operator needs.
    #[arg(long)]
    pub(crate) monitoring: bool,
    /// Also write certificates for cert-manager to make.
    #[arg(long)]
    pub(crate) cert_manager: bool,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The checkpoint.
    pub(crate) model: String,
}

/// Arguments of `export`.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// A checkpoint that a structured method made with --layout masked.
    pub(crate) model: String,
    /// The layout to write.
    #[arg(long)]
    pub(crate) layout: LayoutArg,
    /// Where it goes: a directory that does not exist yet or is empty.
    #[arg(long, short)]
    pub(crate) output: PathBuf,
    /// What stays must be such that this many devices can share it [default: 1].
    #[arg(long, value_parser = positive)]
    pub(crate) tensor_parallel: Option<usize>,
    /// Largest shard, e.g. 5GB or 512MiB.
    #[arg(long, default_value = "5GB")]
    pub(crate) shard_size: String,
}

/// Flags that stand for keys of a coordinator's configuration.
#[derive(Debug, Args)]
pub(crate) struct ConfigFlags {
    /// Its configuration file.
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// Where to listen.
    #[arg(long)]
    pub(crate) listen: Option<SocketAddr>,
    /// Where runs keep their journals and artifacts: a folder, or an s3://, gs:// or az:// URL.
    #[arg(long)]
    pub(crate) runs: Option<String>,
    /// Workers to wait for before a run is planned.
    #[arg(long)]
    pub(crate) workers: Option<u32>,
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every key of a coordinator's configuration with its value and where that is from: default, file, environment, flag.
    Show(ConfigFlags),
    /// List every key with its meaning and default; with --json, as a JSON schema.
    Keys,
}

/// Arguments of `coordinator`.
#[derive(Debug, Args)]
pub(crate) struct CoordinatorArgs {
    #[command(flatten)]
    pub(crate) config: ConfigFlags,
    /// Run this one job, going on with its run if it was begun, and end with its exit code.
    #[arg(long, value_name = "FILE", conflicts_with = "runs")]
    pub(crate) job: Option<PathBuf>,
    /// With --job: where the run keeps its journal and artifacts [default: OUTPUT.run].
    #[arg(long, value_name = "RUN", requires = "job")]
    pub(crate) run: Option<String>,
}

/// Arguments of commands that only need a coordinator.
#[derive(Debug, Args)]
pub(crate) struct RemoteArgs {
    /// The coordinator.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7433")]
    pub(crate) coordinator: String,
    #[command(flatten)]
    pub(crate) access: AccessArgs,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// A run's folder or URL, to read its journal and ask no coordinator; with --watch also a run as the coordinator lists it.
    pub(crate) run: Option<String>,
    /// Keep showing it. With a run, this ends when the run does, with the run's exit code.
    #[arg(long)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) remote: RemoteArgs,
}

/// Arguments of `cancel`.
#[derive(Debug, Args)]
pub(crate) struct CancelArgs {
    /// The run, as `status` lists it, or its folder (with a slash in it) or URL.
    pub(crate) run: String,
    #[command(flatten)]
    pub(crate) remote: RemoteArgs,
}

/// Arguments of `resume`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    /// The run's folder or URL.
    pub(crate) run: String,
    /// How workers share the calibration from now on [default: as configured, or as the run was begun].
    #[arg(long)]
    pub(crate) strategy: Option<StrategyArg>,
    #[command(flatten)]
    pub(crate) local: LocalArgs,
    /// Serve the page of this run here while it goes on, on loopback only, e.g. 127.0.0.1:8080.
    #[arg(long, value_name = "ADDR")]
    pub(crate) http: Option<SocketAddr>,
}

/// Arguments of `report`.
#[derive(Debug, Args)]
pub(crate) struct ReportArgs {
    /// The run's folder or URL.
    pub(crate) run: String,
    /// Also write it here as a page that needs nothing but itself.
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}
