//! `job.toml`: everything that changes an output bit.

mod sparsity;

use serde::{Deserialize, Serialize};

pub use self::sparsity::{Allocation, PatternSpec};
use crate::pattern::{Pattern, PatternError};

/// A job: what is to be computed. Where it runs is no part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// What to prune.
    pub model: ModelSpec,
    /// With which inputs.
    pub calibration: CalibrationSpec,
    /// How.
    #[serde(default)]
    pub method: MethodSpec,
    /// To what.
    #[serde(default)]
    pub pattern: PatternSpec,
    /// Which inputs a layer sees.
    #[serde(default)]
    pub propagation: PropagationSpec,
    /// Where the result goes.
    pub output: OutputSpec,
    /// What to measure before and after; changes the report, never the checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<EvaluationSpec>,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A directory, a GGUF file, or `hf://org/name[@revision]`.
    pub source: String,
}

/// `[calibration]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationSpec {
    /// A text file, or a `.jsonl` with `text` or `input_ids`.
    pub source: String,
    /// Number of sequences.
    #[serde(default = "default_samples")]
    pub samples: usize,
    /// Tokens in each.
    #[serde(default = "default_sequence_length")]
    pub sequence_length: usize,
    /// Chooses the windows.
    #[serde(default)]
    pub seed: u64,
    /// Share of the sequences (the last ones) that is kept out of the grams and only measures; 0 for none. What it is if
    /// nothing is said: [`JobSpec::held_out`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out: Option<f64>,
}

fn default_samples() -> usize {
    128
}

fn default_sequence_length() -> usize {
    2048
}

/// `[method]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MethodSpec {
    /// As `espalier-worker methods` lists it.
    #[serde(default = "default_method")]
    pub name: String,
    /// The method's own parameters; only workers know them.
    #[serde(flatten)]
    pub params: serde_json::Map<String, serde_json::Value>,
}

fn default_method() -> String {
    "espalier".to_owned()
}

/// Share of the sequences that the default method holds out.
const HELD_OUT: f64 = 0.125;

impl Default for MethodSpec {
    fn default() -> Self {
        Self { name: default_method(), params: serde_json::Map::new() }
    }
}

/// Calibration sequences that a survey looks at unless the job says otherwise.
const SURVEY_SAMPLES: usize = 32;

/// What the checkpoint of a structured result looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// Full shapes, with zeros: loads wherever the dense model does.
    Masked,
    /// Narrower tensors, all layers alike: loads in stock transformers and vLLM.
    Uniform,
    /// As narrow as the widest layer, the others filled up with zeros: loads where `uniform` does.
    Padded,
    /// Every layer as narrow as it is, for LLaMA's kind: `DeciLMForCausalLM` with `block_configs`. llama.cpp's converter takes
    /// it as it is; transformers and vLLM want NVIDIA's own config class beside it.
    NemotronNas,
}

/// Which inputs a layer is calibrated with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Propagation {
    /// Those its pruned predecessors give: a chain.
    #[default]
    Pruned,
    /// Those the dense model gives: layers are independent; inside a layer, later groups still see pruned earlier ones.
    Dense,
}

impl Propagation {
    /// Its name in job files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pruned => "pruned",
            Self::Dense => "dense",
        }
    }
}

/// `[propagation]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PropagationSpec {
    /// Which inputs a layer is calibrated with.
    #[serde(default)]
    pub mode: Propagation,
}

/// `[output]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputSpec {
    /// A directory that does not exist yet or is empty.
    pub uri: String,
    /// Largest shard, e.g. `"5GB"` (decimal) or `"512MiB"`.
    #[serde(default = "default_shard_size")]
    pub shard_size: String,
    /// Element type of pruned tensors.
    #[serde(default)]
    pub dtype: OutputDtype,
    /// Methods that remove heads and channels: what is left of the tensors; `uniform` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layout: Option<Layout>,
    /// Methods that remove heads and channels: what stays can be split over this many devices; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tensor_parallel: Option<usize>,
}

fn default_shard_size() -> String {
    "5GB".to_owned()
}

/// `[evaluation]`: perplexity on consecutive windows of a text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSpec {
    /// A text file, read as it is, or a `.jsonl`.
    pub source: String,
    /// Tokens in each window.
    #[serde(default = "default_sequence_length")]
    pub sequence_length: usize,
    /// At most this many windows, the first ones; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_windows: Option<usize>,
}

/// Element type of the output's pruned tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputDtype {
    /// As the source has them.
    #[default]
    Keep,
}

/// Why a job cannot be run, before anything is read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum JobError {
    /// See the pattern.
    #[error("[pattern] is wrong")]
    Pattern(#[from] PatternError),
    /// Both kinds of pattern were given.
    #[error("[pattern] has both sparsity = {sparsity} and nofm = \"{nofm}\": give one")]
    TwoPatterns {
        /// Share of zeros.
        sparsity: f64,
        /// N:M.
        nofm: String,
    },
    /// A number that must be positive is not.
    #[error("{key} is 0, but must be at least 1")]
    Zero {
        /// The job's key.
        key: &'static str,
    },
    /// Windows that predict nothing.
    #[error("[evaluation] sequence_length must be at least 2")]
    ShortWindows,
    /// A share that is not one.
    #[error("{key} is {value}, but must be at least 0 and below 1")]
    ShareOutOfRange {
        /// The job's key.
        key: &'static str,
        /// What it was.
        value: f64,
    },
    /// N:M leaves nothing to spread.
    #[error("[pattern] nofm = \"{nofm}\" is the same in every layer: allocation must be \"uniform\"")]
    FixedPattern {
        /// N:M.
        nofm: String,
    },
    /// A parameter of another allocation.
    #[error("{key} is set, but the job's allocation has no use for it")]
    AllocationUnused {
        /// The job's key.
        key: &'static str,
    },
    /// A number that must be above 0 is not.
    #[error("{key} is {value}, but must be above 0")]
    NotPositive {
        /// The job's key.
        key: &'static str,
        /// What it was.
        value: f64,
    },
    /// Nothing to choose from, or too much.
    #[error("[pattern] depth_weights has {count} values, but must have between 1 and {most}")]
    DepthWeights {
        /// How many there are.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// Nothing is left to find the depth weight on.
    #[error(
        "[calibration] samples is 1, but allocation = \"measured\" needs at least 2: it tries its plans on one of them"
    )]
    NothingToTryOn,
    /// Nothing is left to solve on.
    #[error("[calibration] held_out is {held_out}, but samples is {samples}: holding one out takes at least 2")]
    NothingToHoldOut {
        /// The share.
        held_out: f64,
        /// Number of sequences.
        samples: usize,
    },
    /// Not a size.
    #[error("[output] shard_size `{0}` is not a size such as 5GB or 512MiB")]
    Size(String),
}

impl JobSpec {
    /// The pattern asked of the whole model.
    ///
    /// # Errors
    /// `Pattern` or `TwoPatterns`.
    pub fn pattern(&self) -> Result<Pattern, JobError> {
        let pattern = match (self.pattern.sparsity, &self.pattern.nofm) {
            (Some(sparsity), Some(nofm)) => {
                return Err(JobError::TwoPatterns { sparsity, nofm: nofm.clone() });
            }
            (Some(sparsity), None) => Pattern::Unstructured { sparsity },
            (None, Some(nofm)) => Pattern::parse_nofm(nofm)?,
            (None, None) => Pattern::Unstructured { sparsity: 0.5 },
        };
        pattern.validate()?;
        Ok(pattern)
    }

    /// The largest shard in bytes.
    ///
    /// # Errors
    /// `Size`.
    pub fn shard_bytes(&self) -> Result<u64, JobError> {
        parse_size(&self.output.shard_size).ok_or_else(|| JobError::Size(self.output.shard_size.clone()))
    }

    /// Share of the calibration sequences that is held out. If nothing is said, an eighth for the default method, which
    /// chooses its targets on them, unless that is less than one sequence; and none for others.
    pub fn held_out(&self) -> f64 {
        let is_usual = self.method.name == default_method() && self.calibration.samples as f64 * HELD_OUT >= 1.0;
        self.calibration.held_out.unwrap_or(if is_usual { HELD_OUT } else { 0.0 })
    }

    /// Number of calibration sequences that are held out: the share, rounded, but at least 1 if any was asked for and at
    /// least 1 left over.
    pub fn held_out_samples(&self) -> usize {
        let held_out = self.held_out();
        if held_out <= 0.0 {
            return 0;
        }
        let asked = (self.calibration.samples as f64 * held_out).round() as usize;
        asked.clamp(1, self.calibration.samples.saturating_sub(1).max(1))
    }

    /// Number of calibration sequences, the first ones, that a survey of the dense model looks at: none of those that are
    /// held out, or that [`Self::trial_samples`] keeps apart.
    pub fn survey_samples(&self) -> usize {
        let apart = match self.pattern.allocation {
            Allocation::Measured => self.kept_for_trials(),
            _ => self.held_out_samples(),
        };
        self.calibration.samples.saturating_sub(apart).clamp(1, self.most_surveyed())
    }

    /// Number of calibration sequences, the last ones, that the plans of `measured` are tried on: those that are held out; if
    /// none are, an eighth of all.
    pub fn trial_samples(&self) -> usize {
        self.kept_for_trials().clamp(1, self.most_surveyed())
    }

    fn kept_for_trials(&self) -> usize {
        match self.held_out_samples() {
            0 => (self.calibration.samples / 8).max(1),
            held_out => held_out,
        }
    }

    fn most_surveyed(&self) -> usize {
        self.pattern.allocation_samples.unwrap_or(SURVEY_SAMPLES).max(1)
    }

    /// Checks everything that can be checked without reading a file.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), JobError> {
        self.pattern()?;
        self.shard_bytes()?;
        for (key, value) in [
            ("[calibration] samples", self.calibration.samples),
            ("[calibration] sequence_length", self.calibration.sequence_length),
            ("[pattern] round_to", self.pattern.round_to.unwrap_or(1)),
            ("[pattern] allocation_samples", self.pattern.allocation_samples.unwrap_or(1)),
            ("[output] tensor_parallel", self.output.tensor_parallel.unwrap_or(1)),
            ("[evaluation] max_windows", self.evaluation.as_ref().and_then(|spec| spec.max_windows).unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(JobError::Zero { key });
            }
        }
        if self.evaluation.as_ref().is_some_and(|spec| spec.sequence_length < 2) {
            return Err(JobError::ShortWindows);
        }
        self.pattern.check_allocation()?;
        if self.pattern.allocation == Allocation::Measured && self.calibration.samples < 2 {
            return Err(JobError::NothingToTryOn);
        }
        let held_out = self.held_out();
        if !(0.0..1.0).contains(&held_out) {
            return Err(JobError::ShareOutOfRange { key: "[calibration] held_out", value: held_out });
        }
        if held_out > 0.0 && self.calibration.samples < 2 {
            return Err(JobError::NothingToHoldOut { held_out, samples: self.calibration.samples });
        }
        Ok(())
    }
}

/// Reads `5GB`, `512MiB` or plain bytes; `None` for anything else, and for 0.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    digits.trim().parse::<u64>().ok()?.checked_mul(unit).filter(|&bytes| bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = r#"
        [model]
        source = "m"
        [calibration]
        source = "c.txt"
        [method]
        name = "fista"
        iterations = 20
        [pattern]
        nofm = "2:4"
        [output]
        uri = "out"
    "#;

    #[test]
    fn method_parameters_pass_through_untouched() {
        let job: JobSpec = toml::from_str(JOB).unwrap();
        assert_eq!(job.method.params["iterations"], 20);
        assert_eq!(job.pattern(), Ok(Pattern::NofM { keep: 2, of: 4 }));
        assert_eq!(job.calibration.samples, 128);
        job.validate().unwrap();
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = toml::from_str::<JobSpec>(&JOB.replace("[output]", "[output]\nlayuot = \"x\"")).unwrap_err();
        assert!(error.to_string().contains("layuot"), "{error}");
    }

    #[test]
    fn only_a_share_of_zeros_can_be_spread_over_layers() {
        let job = |pattern: &str| {
            let job: JobSpec = toml::from_str(&JOB.replace("nofm = \"2:4\"", pattern)).unwrap();
            job.validate().map_err(|error| error.to_string())
        };
        job("sparsity = 0.7\nallocation = \"log\"\nallocation_spread = 0.1").unwrap();
        for (pattern, key) in [
            ("nofm = \"2:4\"\nallocation = \"log\"", "2:4"),
            ("allocation_spread = 0.1", "allocation_spread"),
            ("allocation = \"log\"\nallocation_spread = 1.5", "1.5"),
            ("nofm = \"2:4\"\nallocation = \"measured\"", "2:4"),
            ("nofm = \"2:4\"\nallocation = \"owl\"", "2:4"),
            ("allocation = \"log\"\nallocation_samples = 4", "allocation_samples"),
            ("allocation = \"owl\"\nallocation_samples = 0", "allocation_samples"),
            ("allocation = \"measured\"\noutliers_above = 5.0", "outliers_above"),
            ("allocation = \"owl\"\noutliers_above = 0.0", "outliers_above is 0"),
            ("allocation = \"owl\"\ndepth_weights = [0.0]", "depth_weights"),
            ("allocation = \"measured\"\ndepth_weights = []", "depth_weights has 0"),
            ("allocation = \"measured\"\ndepth_weights = [0.0, -0.1]", "-0.1"),
        ] {
            assert!(job(pattern).unwrap_err().contains(key), "{pattern}");
        }
    }

    #[test]
    fn what_plans_are_tried_on_is_not_surveyed() {
        let mut job: JobSpec = toml::from_str(&JOB.replace("nofm = \"2:4\"", "allocation = \"measured\"")).unwrap();
        for (samples, held_out, most, expected) in [
            (128, 0.0, None, (32, 16)),
            (128, 0.0, Some(1000), (112, 16)),
            (128, 0.5, Some(1000), (64, 64)),
            (128, 0.1, Some(8), (8, 8)),
            (2, 0.0, None, (1, 1)),
        ] {
            (job.calibration.samples, job.calibration.held_out) = (samples, Some(held_out));
            job.pattern.allocation_samples = most;
            job.validate().unwrap();
            assert_eq!((job.survey_samples(), job.trial_samples()), expected, "{samples} {held_out} {most:?}");
        }
        job.calibration.samples = 1;
        assert_eq!(job.validate(), Err(JobError::NothingToTryOn));
    }

    #[test]
    fn the_default_method_holds_an_eighth_out_where_that_is_a_sequence() {
        for (method, samples, asked, expected) in [
            ("espalier", 32, None, 4),
            ("espalier", 8, None, 1),
            ("espalier", 7, None, 0),
            ("espalier", 32, Some(0.0), 0),
            ("espalier", 32, Some(0.5), 16),
            ("alps", 32, None, 0),
            ("alps", 32, Some(0.25), 8),
        ] {
            let mut job: JobSpec = toml::from_str(JOB).unwrap();
            method.clone_into(&mut job.method.name);
            (job.calibration.samples, job.calibration.held_out) = (samples, asked);
            assert_eq!(job.held_out_samples(), expected, "{method} {samples} {asked:?}");
        }
    }

    #[test]
    fn one_sequence_cannot_be_held_out() {
        let mut job: JobSpec = toml::from_str(JOB).unwrap();
        (job.calibration.samples, job.calibration.held_out) = (1, Some(0.9));
        assert_eq!(job.validate(), Err(JobError::NothingToHoldOut { held_out: 0.9, samples: 1 }));
        job.calibration.samples = 2;
        job.validate().unwrap();
        assert_eq!(job.held_out_samples(), 1);
    }

    #[test]
    fn sizes_are_decimal_or_binary() {
        assert_eq!(parse_size("5GB"), Some(5_000_000_000));
        assert_eq!(parse_size("1MiB"), Some(1 << 20));
        assert_eq!(parse_size("0GB"), None);
        assert_eq!(parse_size("5 potatoes"), None);
    }
}
