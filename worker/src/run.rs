//! What the units of one run share: the job, the store, the tokens, the model, the solver.

use std::collections::BTreeSet;
use std::sync::Arc;

use candle_core::Device;
use espalier_common::calibration::{TokenBlock, TokenBlockError};
use espalier_common::checkpoint::{Checkpoint, CheckpointError};
use espalier_common::config;
use espalier_common::fault::FaultClass;
use espalier_common::ids::{LayerIndex, RunId};
use espalier_common::job::{Allocation, JobError, JobSpec, PatternSpec};
use espalier_common::outline::{Effort, LayerOutline, ModelOutline};
use espalier_common::pattern::{Pattern, PatternError};
use espalier_common::report::Artifact;
use espalier_common::store::{BlobStore, StoreError};
use espalier_common::structure::Structure;

use crate::ahead::Ahead;
use crate::artifact::{self, ArtifactError};
use crate::mask::{Mask, MaskError};
use crate::model::{self, Decoder, ModelError};
use crate::prune::{self, MethodError, SolveError, Solver, Statistics};
use crate::reconstruct;

/// Why a job cannot be worked on here.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Not a job.
    #[error("the job cannot be read")]
    Syntax(#[source] serde_json::Error),
    /// See the job.
    #[error(transparent)]
    Job(#[from] JobError),
    /// See the pattern.
    #[error(transparent)]
    Pattern(#[from] PatternError),
    /// See the method.
    #[error("[method]")]
    Method(#[from] MethodError),
    /// See the options.
    #[error("[method]")]
    Reconstruct(#[from] reconstruct::OptionsError),
    /// The method has nothing to choose its solutions on.
    #[error(
        "[method] {method} with these parameters chooses between solutions on held-out sequences, but [calibration] held_out \
         is 0: set it to a share of the samples such as 0.125"
    )]
    NothingHeldOut {
        /// The method.
        method: String,
    },
    /// One sequence cannot both be tuned on and judge the tuning.
    #[error("[method] reconstruct needs at least 2 calibration sequences, but [calibration] samples is {samples}")]
    NothingToTuneOn {
        /// `[calibration] samples`.
        samples: usize,
    },
    /// The method does not cover the pattern.
    #[error(transparent)]
    Unsupported(#[from] SolveError),
    /// See the checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// See the model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// See the store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// See the artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// See the mask.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// The token block cannot be read.
    #[error("{name}")]
    Tokens {
        /// The artifact.
        name: String,
        /// What is wrong with it.
        #[source]
        source: TokenBlockError,
    },
    /// What the coordinator put into the run's store is not there for this worker.
    #[error(
        "this worker does not see the run that the coordinator keeps in {url}, which has to be a path or URL that all machines \
         have"
    )]
    Unseen {
        /// The run.
        url: String,
        /// What is missing.
        #[source]
        source: ArtifactError,
    },
    /// The token block is not the one that the job describes.
    #[error("{name} has {sequences} sequences of {length} tokens, but the job asks for {samples} of {asked}")]
    TokenShape {
        /// The artifact.
        name: String,
        /// Sequences found.
        sequences: usize,
        /// Tokens in each.
        length: usize,
        /// `[calibration] samples`.
        samples: usize,
        /// `[calibration] sequence_length`.
        asked: usize,
    },
}

impl RunError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Syntax(_)
            | Self::Job(_)
            | Self::Pattern(_)
            | Self::Method(_)
            | Self::Reconstruct(_)
            | Self::NothingHeldOut { .. }
            | Self::NothingToTuneOn { .. }
            | Self::TokenShape { .. } => FaultClass::Reject,
            Self::Unsupported(error) => error.class(),
            Self::Checkpoint(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Store(error) => error.class(),
            Self::Artifact(error) | Self::Unseen { source: error, .. } => error.class(),
            Self::Mask(error) => error.class(),
            Self::Tokens { .. } => FaultClass::Bug,
        }
    }
}

/// A job's method made ready.
pub struct Method {
    /// The solver.
    pub solver: Box<dyn Solver>,
    /// How the halves of a layer are tuned once they are pruned, if they are.
    pub reconstruct: Option<reconstruct::Options>,
    /// Version of its output bits.
    pub version: String,
    /// Its parameters with every default filled in.
    pub params: serde_json::Value,
}

/// Reads a job as it came over the wire and checks what can be checked without files.
///
/// # Errors
/// `Syntax`, `Job`.
pub fn parse_job(json: &str) -> Result<JobSpec, RunError> {
    let job: JobSpec = serde_json::from_str(json).map_err(RunError::Syntax)?;
    job.validate()?;
    Ok(job)
}

/// Builds the job's method and asks whether it covers the job's pattern.
///
/// # Errors
/// `Method`, `Unsupported`, `Mask`; `NothingHeldOut`, `NothingToTuneOn` if the calibration has too few sequences for it.
pub fn build_method(job: &JobSpec) -> Result<Method, RunError> {
    let name = job.method.name.as_str();
    let mut own = job.method.params.clone();
    let reconstruct = reconstruct::Options::take(&mut own)?;
    if let Some(alpha) = prune::usual_alpha(name, job.held_out_samples() > 0) {
        own.entry("alpha").or_insert(alpha.into());
    }
    let (solver, mut params) = prune::build(name, &serde_json::Value::Object(own))?;
    let mut version =
        prune::METHODS.iter().find(|method| method.name == name).expect("it was just built").version.to_owned();
    solver.supports(pattern(job, &*solver)?)?;
    if solver.needs_held_out() && job.held_out_samples() == 0 {
        return Err(RunError::NothingHeldOut { method: name.to_owned() });
    }
    if reconstruct.is_some() && job.calibration.samples < 2 {
        return Err(RunError::NothingToTuneOn { samples: job.calibration.samples });
    }
    if let (Some(options), serde_json::Value::Object(params)) = (&reconstruct, &mut params) {
        params.extend(options.filled());
        version = format!("{version}+{}", reconstruct::VERSION);
    }
    Ok(Method { solver, reconstruct, version, params })
}

/// The pattern that the job asks for: the mask's zeros if the method takes those.
///
/// # Errors
/// `Job`; `Mask` if the method takes the zeros of a mask and there is none, or another pattern beside it.
pub fn pattern(job: &JobSpec, solver: &dyn Solver) -> Result<Pattern, RunError> {
    let Some(mask) = solver.imports() else { return Ok(job.pattern()?) };
    let method = job.method.name.clone();
    let PatternSpec { sparsity, nofm, allocation, .. } = &job.pattern;
    let given = [
        ("sparsity", sparsity.is_some()),
        ("nofm", nofm.is_some()),
        ("allocation", *allocation != Allocation::Uniform),
    ];
    if let Some((key, _)) = given.into_iter().find(|(_, given)| *given) {
        return Err(MaskError::PatternGiven { key, method }.into());
    }
    if mask.is_empty() {
        return Err(MaskError::Unnamed { method }.into());
    }
    Ok(Pattern::Imported)
}

/// A model that is open: headers read, no weights.
pub struct Model {
    /// Its files.
    pub checkpoint: Arc<dyn Checkpoint>,
    /// Its shape, and the way to its weights.
    pub decoder: Arc<dyn Decoder>,
}

/// Opens the model that a URI names.
///
/// # Errors
/// `Checkpoint`, `Model`.
pub fn open_model(uri: &str, device: &Device) -> Result<Model, RunError> {
    let checkpoint = config::open_model(uri)?;
    let decoder = Arc::from(model::open(Arc::clone(&checkpoint), device)?);
    Ok(Model { checkpoint, decoder })
}

/// Reads and checks a token block of the run's store.
///
/// # Errors
/// `Artifact`, `Tokens`.
pub fn read_tokens(store: &dyn BlobStore, artifact: &Artifact) -> Result<TokenBlock, RunError> {
    let bytes = artifact::read(store, artifact)?;
    TokenBlock::from_bytes(&bytes).map_err(|source| RunError::Tokens { name: artifact.name.clone(), source })
}

/// Says what a job's model is made of, with everything checked that headers can tell.
///
/// # Errors
/// See [`RunError`].
pub fn inspect(job_json: &str) -> Result<ModelOutline, RunError> {
    let job = parse_job(job_json)?;
    let mut method = build_method(&job)?;
    let pattern = pattern(&job, &*method.solver)?;
    let Model { checkpoint, decoder } = open_model(&job.model.source, &Device::Cpu)?;
    let layers: Vec<LayerOutline> = (0..decoder.layers())
        .map(|layer| decoder.outline(LayerIndex(layer as u32)))
        .collect::<Result<_, ModelError>>()?;
    for sublayer in layers.iter().flat_map(LayerOutline::sublayers) {
        pattern.validate_for(&sublayer.tensor, sublayer.columns)?;
    }
    if let Some(mask) = open_mask(&*method.solver)? {
        mask.check(&layers)?;
        method.version = format!("{}+{}", method.version, mask.version()?);
        name_mask(&mut method.params);
    }
    let all_bytes: usize =
        checkpoint.names().iter().filter_map(|name| checkpoint.header(name)).map(|h| h.bytes()).sum();
    let layer_bytes: u64 = layers.iter().map(|layer| layer.bytes).sum();
    Ok(ModelOutline {
        family: decoder.family().to_owned(),
        hidden_size: decoder.hidden_size(),
        vocabulary_size: decoder.vocabulary_size(),
        max_sequence_length: decoder.max_sequence_length(),
        other_bytes: (all_bytes as u64).saturating_sub(layer_bytes),
        structure: structure_for(&*method.solver, &*decoder, &job),
        imports_zeros: method.solver.imports().is_some(),
        needs_whole: method.solver.structured().is_some() || method.reconstruct.is_some(),
        needs_dense: method.solver.needs() >= Statistics::GramAndCross || method.reconstruct.is_some(),
        method_version: method.version,
        method_params: method.params,
        efforts: efforts(&*method.solver, &layers),
        layers,
    })
}

/// What a method takes, for each width that a group has.
fn efforts(solver: &dyn Solver, layers: &[LayerOutline]) -> Vec<Effort> {
    let widths: BTreeSet<usize> = layers.iter().flat_map(LayerOutline::sublayers).map(|one| one.columns).collect();
    widths.into_iter().map(|columns| solver.effort(columns)).collect()
}

/// The mask that a method names, if it takes one.
fn open_mask(solver: &dyn Solver) -> Result<Option<Mask>, MaskError> {
    solver.imports().map(Mask::open).transpose()
}

/// Reports tell which mask it was by its digest; where it lay on this machine is nobody's business.
fn name_mask(params: &mut serde_json::Value) {
    if let Some(mask) = params.get_mut("mask")
        && let Some(path) = mask.as_str().filter(|path| !path.contains("://"))
    {
        let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned();
        *mask = name.into();
    }
}

/// What a method may cut of a model: nothing unless it is a structured one.
fn structure_for(solver: &dyn Solver, decoder: &dyn Decoder, job: &JobSpec) -> Option<Structure> {
    let cuts_attention = solver.structured()?.cuts_attention();
    let mut structure = decoder.structure(job.pattern.attention.unwrap_or_default());
    if !cuts_attention {
        structure.layers.iter_mut().for_each(|layer| layer.attention = None);
    }
    Some(structure)
}

/// One run, as a worker that is attached to it has it.
pub struct Run {
    /// Its name.
    pub id: RunId,
    /// What is computed.
    pub job: JobSpec,
    /// The job as it came, to tell whether a second `Prepare` says the same.
    pub job_json: String,
    /// Where its artifacts are.
    pub store: Arc<dyn BlobStore>,
    /// The calibration tokens.
    pub tokens: TokenBlock,
    /// The model.
    pub model: Model,
    /// The layer after the one that is worked on.
    pub ahead: Ahead,
    /// The solver.
    pub method: Method,
    /// The checkpoint whose zeros it keeps, if it is a method that does.
    pub mask: Option<Mask>,
    /// What it may cut, if it removes heads and channels.
    pub structure: Option<Structure>,
    /// What layers are run on. Statistics and weights that are solved for are on the host.
    pub device: Device,
}

impl Run {
    /// Opens everything that the run's units share.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn open(
        id: RunId,
        job_json: String,
        run_url: &str,
        tokens: &Artifact,
        device: &Device,
    ) -> Result<Self, RunError> {
        let job = parse_job(&job_json)?;
        let method = build_method(&job)?;
        let store = config::open_store(run_url)?;
        let name = tokens.name.clone();
        let tokens = read_tokens(&*store, tokens).map_err(|error| match error {
            RunError::Artifact(source @ ArtifactError::Store(StoreError::NotFound { .. })) => {
                RunError::Unseen { url: run_url.to_owned(), source }
            }
            error => error,
        })?;
        let (samples, asked) = (job.calibration.samples, job.calibration.sequence_length);
        let (sequences, length) = (tokens.sequences(), tokens.sequence_length());
        if (sequences, length) != (samples, asked) {
            return Err(RunError::TokenShape { name, sequences, length, samples, asked });
        }
        let device = device.clone();
        let model = open_model(&job.model.source, &device)?;
        let structure = structure_for(&*method.solver, &*model.decoder, &job);
        let mask = open_mask(&*method.solver)?;
        let ahead = Ahead::new(Ahead::pays(&job.model.source, &device));
        Ok(Self { id, job, job_json, store, tokens, model, ahead, method, mask, structure, device })
    }

    /// The pattern that a layer is to get.
    ///
    /// # Errors
    /// `Syntax`, `Pattern`.
    pub fn layer_pattern(json: &str) -> Result<Pattern, RunError> {
        let pattern: Pattern = serde_json::from_str(json).map_err(RunError::Syntax)?;
        pattern.validate()?;
        Ok(pattern)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn alpha(method: Value, held_out: f64) -> Value {
        let job = json!({
            "model": { "source": "m" },
            "calibration": { "source": "c", "held_out": held_out },
            "method": method,
            "output": { "uri": "o" },
        });
        build_method(&parse_job(&job.to_string()).unwrap()).unwrap().params["alpha"].clone()
    }

    #[test]
    fn targets_are_blended_where_sequences_are_held_out_and_nothing_else_is_said() {
        let espalier = || json!({ "name": "espalier" });
        assert_eq!((alpha(espalier(), 0.125), alpha(espalier(), 0.0)), (json!(0.5), json!(0.0)));
        assert_eq!(alpha(json!({ "name": "espalier", "alpha": 0.0 }), 0.125), json!(0.0));
        assert_eq!(alpha(json!({ "name": "alps" }), 0.125), Value::Null);
    }
}
