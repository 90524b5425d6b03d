//! What workers report and the journal keeps: plain data, the same on both sides of the wire.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::structure::Kept;

/// Bytes in a run's store, named by content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Artifact {
    /// Name in the run's store.
    pub name: String,
    /// Digest of the bytes.
    pub sha256: Digest,
    /// Number of bytes.
    pub bytes: u64,
}

/// One pruned sublayer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SublayerReport {
    /// Full tensor name.
    pub tensor: String,
    /// ‖W'X̂ − Y‖² / ‖Y‖² on the calibration inputs, after the cast to the stored type; 0 if ‖Y‖ is. Y is the dense weight's
    /// outputs WX̂ on the same inputs or, for methods that compare these with the dense model's (some do when they are asked
    /// for a target blend), the dense model's WX. Errors compare where Y is the same.
    pub rel_error: f64,
    /// The same on the held-out inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_error: Option<f64>,
    /// Weights that are zero.
    pub zeros: u64,
    /// All weights.
    pub elements: u64,
    /// Seconds of solving.
    pub seconds: f64,
    /// Iterations of the method's main loop.
    pub iterations: u32,
    /// Share of the mean diagonal that was added to the gram.
    pub damping: f64,
    /// How often damping had to be raised.
    pub damping_raised: u32,
    /// Input channels that were never active.
    pub dead_channels: u32,
    /// The target blend α that was taken, if one was asked for: less than that where it is better on the held-out inputs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// How the half of the layer that the sublayer belongs to was tuned afterwards, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<Reconstruction>,
}

/// A sub-module (attention or feed-forward) whose surviving weights were tuned together.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reconstruction {
    /// ‖error‖² / ‖target‖² of the sub-module on held-out sequences, as the solver left it.
    pub error_before: f64,
    /// The same of what is stored; not below `error_before` if nothing better was found.
    pub error_after: f64,
    /// Epochs run.
    pub epochs: u32,
}

/// Time and arithmetic of one phase of one unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseSeconds {
    /// `load`, `forward`, `gram`, `solve`, `reconstruct`, `verify`, `store`, `fetch`, `evaluate`, `survey`,
    /// `wait` for assistants that compute, and `transfer` for what they send while it is waited for; of a worker with a GPU also
    /// `solve-host`, for methods that are not solved there, and `make-room`, when its memory did not last.
    pub phase: String,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Floating-point operations of the matrix products done in it.
    pub flops: f64,
}

/// How the error of one sublayer of the dense model grows with its sparsity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorCurve {
    /// Full tensor name.
    pub tensor: String,
    /// How much of what follows it the sublayer's half of the layer makes up: ‖what the half adds‖² / ‖the residual stream
    /// after it‖², mean over tokens. An error of the sublayer counts this much.
    pub share: f64,
    /// ‖W'X − WX‖² / ‖WX‖² at each sparsity that was asked for.
    pub errors: Vec<f64>,
}

/// What a survey found out about one dense layer.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct LayerSurvey {
    /// `owl`: share of the layer's weights whose score is a multiple of the mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outliers: Option<f64>,
    /// `measured`: one curve a sublayer, in dataflow order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub curves: Vec<ErrorCurve>,
}

/// What moves tensors between two workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkKind {
    /// Nothing: they are in one process.
    Loopback,
    /// The stream on which they talk.
    Grpc,
    /// Memory of the machine that both are on; what is said about it goes over the stream.
    Shm,
    /// NVIDIA's library, from GPU to GPU.
    Nccl,
}

impl LinkKind {
    /// Its name, on the wire and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::Grpc => "grpc",
            Self::Shm => "shm",
            Self::Nccl => "nccl",
        }
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Loopback, Self::Grpc, Self::Shm, Self::Nccl].into_iter().find(|kind| kind.name() == name)
    }
}

/// What joined a layer's owner with an assistant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LinkUse {
    /// What it was.
    pub kind: LinkKind,
    /// Why nothing faster was used that the owner has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub declined: Option<String>,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// How a unit ended well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A layer was pruned.
    Pruned {
        /// Its pruned tensors.
        artifact: Artifact,
        /// One entry a sublayer, in dataflow order; for structured methods, one a consumer.
        sublayers: Vec<SublayerReport>,
        /// What stays of the layer, if the method removes heads and channels.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        kept: Option<Kept>,
        /// Where the time went.
        phases: Vec<PhaseSeconds>,
        /// Its output hidden states, if they were to be stored.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        boundary: Option<Artifact>,
        /// Assistants that were given up on; the worker did their part itself.
        #[serde(default, skip_serializing_if = "is_zero")]
        assistants_lost: u32,
        /// What joined the worker with each assistant.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        links: Vec<LinkUse>,
    },
    /// A dense layer was run.
    Forwarded {
        /// Where the time went.
        phases: Vec<PhaseSeconds>,
    },
    /// A dense layer was run and looked at.
    Surveyed {
        /// What was found.
        survey: LayerSurvey,
        /// Where the time went.
        phases: Vec<PhaseSeconds>,
    },
    /// Windows were evaluated.
    Evaluated {
        /// Sum of negative log-likelihoods of each window in nats, in the order asked for.
        window_nll: Vec<f64>,
        /// Where the time went.
        phases: Vec<PhaseSeconds>,
    },
}
