//! `job.toml`: everything that changes an output bit.

use serde::{Deserialize, Serialize};

use crate::pattern::{Pattern, PatternError};
use crate::structure::AttentionUnit;

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
    /// Share of the sequences (the last ones) that is kept out of the grams and only measures; 0 for none.
    #[serde(default)]
    pub held_out: f64,
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

impl Default for MethodSpec {
    fn default() -> Self {
        Self { name: default_method(), params: serde_json::Map::new() }
    }
}

/// How sparsity is spread over layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Allocation {
    /// The same in every layer.
    #[default]
    Uniform,
    /// More in later layers, along a logarithm (SlimGPT's, for methods that remove heads and channels).
    Log,
}

/// `[pattern]`: exactly one of `sparsity` and `nofm`; 50 % if neither. For methods that remove heads and channels, sparsity
/// is the share of the layers' parameters that goes.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatternSpec {
    /// Share of zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<f64>,
    /// `"2:4"`: 2 kept of every 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nofm: Option<String>,
    /// How sparsity is spread over layers.
    #[serde(default)]
    pub allocation: Allocation,
    /// How much sparser the last layer is than the first, with `allocation = "log"` and a share of zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation_spread: Option<f64>,
    /// Methods that remove heads: what goes at a time; KV heads if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<AttentionUnit>,
    /// Methods that remove channels: as many stay as are a multiple of this; if absent, of 8, which kernels are made for, and
    /// of what the layout and tensor parallelism ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_to: Option<usize>,
    /// Methods that remove heads: KV heads that every layer loses, each with its query heads; chosen if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_heads: Option<usize>,
}

impl PatternSpec {
    /// `allocation_spread`, or what is usual: OWL's 2λ.
    pub fn spread(&self) -> f64 {
        self.allocation_spread.unwrap_or(0.16)
    }
}

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
    /// A spread of nothing.
    #[error("[pattern] allocation_spread is set, but allocation is not \"log\"")]
    SpreadUnused,
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

    /// Number of calibration sequences that are held out: the share, rounded, but at least 1 if any was asked for and at
    /// least 1 left over.
    pub fn held_out_samples(&self) -> usize {
        if self.calibration.held_out <= 0.0 {
            return 0;
        }
        let asked = (self.calibration.samples as f64 * self.calibration.held_out).round() as usize;
        asked.clamp(1, self.calibration.samples.saturating_sub(1).max(1))
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
            ("[output] tensor_parallel", self.output.tensor_parallel.unwrap_or(1)),
        ] {
            if value == 0 {
                return Err(JobError::Zero { key });
            }
        }
        if self.evaluation.as_ref().is_some_and(|spec| spec.sequence_length < 2) {
            return Err(JobError::ShortWindows);
        }
        let PatternSpec { nofm, allocation, allocation_spread, .. } = &self.pattern;
        match (allocation, nofm, allocation_spread) {
            (Allocation::Uniform, _, Some(_)) => return Err(JobError::SpreadUnused),
            (Allocation::Log, Some(nofm), _) => return Err(JobError::FixedPattern { nofm: nofm.clone() }),
            (Allocation::Log, None, Some(spread)) if !(0.0..1.0).contains(spread) => {
                return Err(JobError::ShareOutOfRange { key: "[pattern] allocation_spread", value: *spread });
            }
            _ => {}
        }
        let held_out = self.calibration.held_out;
        if !(0.0..1.0).contains(&held_out) {
            return Err(JobError::ShareOutOfRange { key: "[calibration] held_out", value: held_out });
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
        ] {
            assert!(job(pattern).unwrap_err().contains(key), "{pattern}");
        }
    }

    #[test]
    fn sizes_are_decimal_or_binary() {
        assert_eq!(parse_size("5GB"), Some(5_000_000_000));
        assert_eq!(parse_size("1MiB"), Some(1 << 20));
        assert_eq!(parse_size("0GB"), None);
        assert_eq!(parse_size("5 potatoes"), None);
    }
}
