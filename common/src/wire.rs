//! Between messages and domain types: the one file that sees both.

use std::ops::Range;

use espalier_proto::v1 as pb;

use crate::calibration::LEAVES;
use crate::digest::Digest;
use crate::fault::{Fault, FaultClass};
use crate::ids::{Attempt, Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
use crate::outline::{Effort, LayerOutline, ModelOutline, SublayerOutline};
use crate::report::{
    Artifact, ErrorCurve, LayerSurvey, LinkKind, LinkUse, Outcome, PhaseSeconds, Reconstruction, SublayerReport,
};
use crate::structure::Kept;

/// A message that breaks the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not.
    #[error("message lacks {0}")]
    Missing(&'static str),
    /// A field holds something it may not.
    #[error("field {field} is wrong: {reason}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

fn invalid(field: &'static str, reason: impl std::fmt::Display) -> WireError {
    WireError::Invalid { field, reason: reason.to_string() }
}

impl From<Unit> for pb::Unit {
    fn from(unit: Unit) -> Self {
        let (kind, index) = match unit {
            Unit::Forward(layer) => (pb::unit::Kind::Forward, layer.0),
            Unit::Prune(layer) => (pb::unit::Kind::Prune, layer.0),
            Unit::Evaluate(share) => (pb::unit::Kind::Evaluate, share),
        };
        Self { kind: kind.into(), index }
    }
}

impl TryFrom<pb::Unit> for Unit {
    type Error = WireError;

    fn try_from(unit: pb::Unit) -> Result<Self, WireError> {
        match unit.kind() {
            pb::unit::Kind::Forward => Ok(Self::Forward(LayerIndex(unit.index))),
            pb::unit::Kind::Prune => Ok(Self::Prune(LayerIndex(unit.index))),
            pb::unit::Kind::Evaluate => Ok(Self::Evaluate(unit.index)),
            pb::unit::Kind::Unspecified => Err(invalid("unit.kind", "unspecified")),
        }
    }
}

/// A lease as it travels: with the run it belongs to.
pub fn lease_to_wire(run: &RunId, lease: Lease) -> pb::Lease {
    pb::Lease { run: run.0.clone(), unit: Some(lease.unit.into()), worker: lease.worker.0, attempt: lease.attempt.0 }
}

/// A lease and its run, from the wire.
///
/// # Errors
/// `Missing` or `Invalid`.
pub fn lease_from_wire(lease: pb::Lease) -> Result<(RunId, Lease), WireError> {
    let unit = lease.unit.ok_or(WireError::Missing("lease.unit"))?.try_into()?;
    let run = run_from_wire(lease.run)?;
    Ok((run, Lease { unit, worker: WorkerId(lease.worker), attempt: Attempt(lease.attempt) }))
}

/// A run's id; it becomes part of file names, so only plain ones pass.
///
/// # Errors
/// `Invalid` unless it is 1 to 64 letters, digits, `-` and `_`.
pub fn run_from_wire(run: String) -> Result<RunId, WireError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if run.is_empty() || run.len() > 64 || !run.chars().all(plain) {
        return Err(invalid("run", "must be 1 to 64 letters, digits, - and _"));
    }
    Ok(RunId(run))
}

impl From<Artifact> for pb::Artifact {
    fn from(artifact: Artifact) -> Self {
        Self { name: artifact.name, sha256: artifact.sha256.to_string(), bytes: artifact.bytes }
    }
}

impl TryFrom<pb::Artifact> for Artifact {
    type Error = WireError;

    fn try_from(artifact: pb::Artifact) -> Result<Self, WireError> {
        let sha256 = Digest::try_from(artifact.sha256).map_err(|error| invalid("artifact.sha256", error))?;
        Ok(Self { name: artifact.name, sha256, bytes: artifact.bytes })
    }
}

impl From<Fault> for pb::Fault {
    fn from(fault: Fault) -> Self {
        let class = match fault.class {
            FaultClass::RetryHere => pb::fault::Class::RetryHere,
            FaultClass::RetryElsewhere => pb::fault::Class::RetryElsewhere,
            FaultClass::Reject => pb::fault::Class::Reject,
            FaultClass::Bug => pb::fault::Class::Bug,
        };
        Self { class: class.into(), message: fault.message }
    }
}

impl From<pb::Fault> for Fault {
    fn from(fault: pb::Fault) -> Self {
        let class = match fault.class() {
            pb::fault::Class::RetryHere => FaultClass::RetryHere,
            pb::fault::Class::RetryElsewhere => FaultClass::RetryElsewhere,
            pb::fault::Class::Reject => FaultClass::Reject,
            pb::fault::Class::Bug | pb::fault::Class::Unspecified => FaultClass::Bug,
        };
        Self { class, message: fault.message }
    }
}

impl From<ModelOutline> for pb::ModelOutline {
    fn from(outline: ModelOutline) -> Self {
        let sublayer = |sublayer: SublayerOutline| pb::TensorHeader {
            name: sublayer.tensor,
            dtype: sublayer.dtype,
            shape: vec![sublayer.rows as u64, sublayer.columns as u64],
        };
        let layer = |layer: LayerOutline| pb::LayerOutline {
            groups: layer
                .groups
                .into_iter()
                .map(|group| pb::Group { sublayers: group.into_iter().map(sublayer).collect() })
                .collect(),
            bytes: layer.bytes,
        };
        Self {
            family: outline.family,
            layers: outline.layers.into_iter().map(layer).collect(),
            hidden_size: outline.hidden_size as u32,
            vocabulary_size: outline.vocabulary_size as u32,
            max_sequence_length: outline.max_sequence_length.unwrap_or(0) as u32,
            other_bytes: outline.other_bytes,
            method_version: outline.method_version,
            method_params_json: outline.method_params.to_string(),
            needs_dense: outline.needs_dense,
            imports_zeros: outline.imports_zeros,
            needs_whole: outline.needs_whole,
            structure_json: outline.structure.map_or_else(String::new, |structure| {
                serde_json::to_string(&structure).expect("a structure is plain data")
            }),
            efforts: outline.efforts.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<Effort> for pb::Effort {
    fn from(effort: Effort) -> Self {
        Self {
            columns: effort.columns as u32,
            common_flops: effort.common_flops,
            parts: effort.parts as u32,
            part_flops: effort.part_flops,
            row_flops: effort.row_flops,
            block_rows: effort.block_rows as u32,
            speed_percent: effort.speed_percent,
            kept_bytes: effort.kept_bytes,
            row_bytes: effort.row_bytes,
            is_shared: effort.is_shared,
        }
    }
}

impl From<pb::Effort> for Effort {
    fn from(effort: pb::Effort) -> Self {
        Self {
            columns: effort.columns as usize,
            common_flops: effort.common_flops,
            parts: effort.parts as usize,
            part_flops: effort.part_flops,
            row_flops: effort.row_flops,
            block_rows: effort.block_rows as usize,
            speed_percent: effort.speed_percent,
            kept_bytes: effort.kept_bytes,
            row_bytes: effort.row_bytes,
            is_shared: effort.is_shared,
        }
    }
}

impl TryFrom<pb::ModelOutline> for ModelOutline {
    type Error = WireError;

    fn try_from(outline: pb::ModelOutline) -> Result<Self, WireError> {
        let sublayer = |header: pb::TensorHeader| match header.shape[..] {
            [rows, columns] => Ok(SublayerOutline {
                tensor: header.name,
                rows: rows as usize,
                columns: columns as usize,
                dtype: header.dtype,
            }),
            _ => Err(invalid("outline.shape", format!("{} is no matrix", header.name))),
        };
        let layer = |layer: pb::LayerOutline| {
            let groups = layer
                .groups
                .into_iter()
                .map(|group| group.sublayers.into_iter().map(sublayer).collect())
                .collect::<Result<_, WireError>>()?;
            Ok(LayerOutline { groups, bytes: layer.bytes })
        };
        Ok(Self {
            family: outline.family,
            layers: outline.layers.into_iter().map(layer).collect::<Result<_, WireError>>()?,
            hidden_size: outline.hidden_size as usize,
            vocabulary_size: outline.vocabulary_size as usize,
            max_sequence_length: (outline.max_sequence_length > 0).then_some(outline.max_sequence_length as usize),
            other_bytes: outline.other_bytes,
            method_version: outline.method_version,
            method_params: serde_json::from_str(&outline.method_params_json)
                .map_err(|error| invalid("outline.method_params_json", error))?,
            needs_dense: outline.needs_dense,
            imports_zeros: outline.imports_zeros,
            needs_whole: outline.needs_whole,
            structure: match outline.structure_json.as_str() {
                "" => None,
                json => Some(serde_json::from_str(json).map_err(|error| invalid("outline.structure_json", error))?),
            },
            efforts: outline.efforts.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<SublayerReport> for pb::SublayerReport {
    fn from(report: SublayerReport) -> Self {
        Self {
            tensor: report.tensor,
            rel_error: report.rel_error,
            held_out_error: report.held_out_error,
            zeros: report.zeros,
            elements: report.elements,
            seconds: report.seconds,
            iterations: report.iterations,
            damping: report.damping,
            damping_raised: report.damping_raised,
            dead_channels: report.dead_channels,
            alpha: report.alpha,
            reconstruction: report.reconstruction.map(|Reconstruction { error_before, error_after, epochs }| {
                pb::Reconstruction { error_before, error_after, epochs }
            }),
        }
    }
}

impl From<pb::SublayerReport> for SublayerReport {
    fn from(report: pb::SublayerReport) -> Self {
        Self {
            tensor: report.tensor,
            rel_error: report.rel_error,
            held_out_error: report.held_out_error,
            zeros: report.zeros,
            elements: report.elements,
            seconds: report.seconds,
            iterations: report.iterations,
            damping: report.damping,
            damping_raised: report.damping_raised,
            dead_channels: report.dead_channels,
            alpha: report.alpha,
            reconstruction: report.reconstruction.map(|pb::Reconstruction { error_before, error_after, epochs }| {
                Reconstruction { error_before, error_after, epochs }
            }),
        }
    }
}

fn phases_to_wire(phases: Vec<PhaseSeconds>) -> Vec<pb::PhaseSeconds> {
    phases.into_iter().map(|p| pb::PhaseSeconds { phase: p.phase, seconds: p.seconds, flops: p.flops }).collect()
}

fn phases_from_wire(phases: Vec<pb::PhaseSeconds>) -> Vec<PhaseSeconds> {
    phases.into_iter().map(|p| PhaseSeconds { phase: p.phase, seconds: p.seconds, flops: p.flops }).collect()
}

impl From<Outcome> for pb::report_request::Outcome {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Pruned { artifact, sublayers, kept, phases, boundary, assistants_lost, links } => {
                Self::Pruned(pb::Pruned {
                    kept: kept.map(|kept| pb::Kept {
                        cuts_attention: kept.attention.is_some(),
                        attention: kept.attention.unwrap_or_default(),
                        channels: kept.channels,
                    }),
                    artifact: Some(artifact.into()),
                    sublayers: sublayers.into_iter().map(Into::into).collect(),
                    phases: phases_to_wire(phases),
                    boundary: boundary.map(Into::into),
                    assistants_lost,
                    links: links
                        .into_iter()
                        .map(|LinkUse { kind, declined }| pb::LinkUse { kind: kind.name().to_owned(), declined })
                        .collect(),
                })
            }
            Outcome::Forwarded { phases } => Self::Forwarded(pb::Forwarded { phases: phases_to_wire(phases) }),
            Outcome::Surveyed { survey: LayerSurvey { outliers, curves }, phases } => {
                let curve = |ErrorCurve { tensor, share, errors }: ErrorCurve| pb::ErrorCurve { tensor, share, errors };
                let (curves, phases) = (curves.into_iter().map(curve).collect(), phases_to_wire(phases));
                Self::Surveyed(pb::Surveyed { outliers, curves, phases })
            }
            Outcome::Evaluated { window_nll, phases } => {
                Self::Evaluated(pb::Evaluated { window_nll, phases: phases_to_wire(phases) })
            }
        }
    }
}

fn link_from_wire(pb::LinkUse { kind, declined }: pb::LinkUse) -> Result<LinkUse, WireError> {
    let kind = LinkKind::named(&kind).ok_or_else(|| invalid("pruned.links.kind", &kind))?;
    Ok(LinkUse { kind, declined })
}

/// The end of a unit, from the wire: an outcome or a fault.
///
/// # Errors
/// `Missing` or `Invalid`.
pub fn outcome_from_wire(outcome: pb::report_request::Outcome) -> Result<Result<Outcome, Fault>, WireError> {
    Ok(match outcome {
        pb::report_request::Outcome::Pruned(pruned) => Ok(Outcome::Pruned {
            artifact: pruned.artifact.ok_or(WireError::Missing("pruned.artifact"))?.try_into()?,
            sublayers: pruned.sublayers.into_iter().map(Into::into).collect(),
            kept: pruned
                .kept
                .map(|kept| Kept { attention: kept.cuts_attention.then_some(kept.attention), channels: kept.channels }),
            phases: phases_from_wire(pruned.phases),
            boundary: pruned.boundary.map(TryInto::try_into).transpose()?,
            assistants_lost: pruned.assistants_lost,
            links: pruned.links.into_iter().map(link_from_wire).collect::<Result<_, _>>()?,
        }),
        pb::report_request::Outcome::Forwarded(forwarded) => {
            Ok(Outcome::Forwarded { phases: phases_from_wire(forwarded.phases) })
        }
        pb::report_request::Outcome::Surveyed(pb::Surveyed { outliers, curves, phases }) => {
            let curve = |pb::ErrorCurve { tensor, share, errors }| ErrorCurve { tensor, share, errors };
            let survey = LayerSurvey { outliers, curves: curves.into_iter().map(curve).collect() };
            Ok(Outcome::Surveyed { survey, phases: phases_from_wire(phases) })
        }
        pb::report_request::Outcome::Evaluated(evaluated) => {
            Ok(Outcome::Evaluated { window_nll: evaluated.window_nll, phases: phases_from_wire(evaluated.phases) })
        }
        pb::report_request::Outcome::Fault(fault) => Err(fault.into()),
    })
}

/// Where a unit's input hidden states come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceFrom {
    /// Embed the calibration tokens.
    Tokens,
    /// The worker holds this boundary.
    Held(Boundary),
    /// Another worker holds it.
    Peer {
        /// Where that worker's services are.
        endpoint: String,
        /// The boundary.
        boundary: Boundary,
    },
    /// It is in the run's store.
    Stored {
        /// The boundary.
        boundary: Boundary,
        /// As it was committed.
        artifact: Artifact,
    },
}

/// Where a unit's input comes from, and the committed layers to run before it is the unit's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// Where to start.
    pub from: SourceFrom,
    /// Committed layers from there up to the unit's layer (`pruned` propagation only).
    pub replay: Vec<Artifact>,
}

impl Source {
    /// The boundary it starts from.
    pub fn boundary(&self) -> Boundary {
        match self.from {
            SourceFrom::Tokens => Boundary(0),
            SourceFrom::Held(boundary) | SourceFrom::Peer { boundary, .. } | SourceFrom::Stored { boundary, .. } => {
                boundary
            }
        }
    }
}

impl From<Source> for pb::Source {
    fn from(source: Source) -> Self {
        let from = match source.from {
            SourceFrom::Tokens => pb::source::From::Tokens(pb::Tokens {}),
            SourceFrom::Held(boundary) => pb::source::From::Held(pb::Held { boundary: boundary.0 }),
            SourceFrom::Peer { endpoint, boundary } => {
                pb::source::From::Peer(pb::Peer { endpoint, boundary: boundary.0 })
            }
            SourceFrom::Stored { boundary, artifact } => {
                pb::source::From::Stored(pb::Stored { boundary: boundary.0, artifact: Some(artifact.into()) })
            }
        };
        Self { from: Some(from), replay: source.replay.into_iter().map(Into::into).collect() }
    }
}

impl TryFrom<pb::Source> for Source {
    type Error = WireError;

    fn try_from(source: pb::Source) -> Result<Self, WireError> {
        let from = match source.from.ok_or(WireError::Missing("source.from"))? {
            pb::source::From::Tokens(pb::Tokens {}) => SourceFrom::Tokens,
            pb::source::From::Held(held) => SourceFrom::Held(Boundary(held.boundary)),
            pb::source::From::Peer(peer) => {
                SourceFrom::Peer { endpoint: peer.endpoint, boundary: Boundary(peer.boundary) }
            }
            pb::source::From::Stored(stored) => SourceFrom::Stored {
                boundary: Boundary(stored.boundary),
                artifact: stored.artifact.ok_or(WireError::Missing("stored.artifact"))?.try_into()?,
            },
        };
        let replay = source.replay.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?;
        Ok(Self { from, replay })
    }
}

/// With the strategy `data`, what each worker that shares a layer keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shares {
    /// Leaves of each assistant, in their order; the owner has the rest.
    pub leaves: Vec<Range<usize>>,
    /// What the layer before became, if there is one: a share that came of anything else is not used.
    pub predecessor: Option<Artifact>,
}

impl From<Shares> for pb::Shares {
    fn from(Shares { leaves, predecessor }: Shares) -> Self {
        let leaves = leaves.into_iter().map(|leaves| pb::Leaves { first: leaves.start as u32, end: leaves.end as u32 });
        Self { leaves: leaves.collect(), predecessor: predecessor.map(Into::into) }
    }
}

impl TryFrom<pb::Shares> for Shares {
    type Error = WireError;

    fn try_from(shares: pb::Shares) -> Result<Self, WireError> {
        let mut is_taken = [false; LEAVES];
        let mut leaves = Vec::with_capacity(shares.leaves.len());
        for pb::Leaves { first, end } in shares.leaves {
            let range = leaves_from_wire(first, end)?;
            if is_taken[range.clone()].iter_mut().any(|taken| std::mem::replace(taken, true)) {
                return Err(invalid("shares.leaves", format!("some of {range:?} are another's already")));
            }
            leaves.push(range);
        }
        Ok(Self { leaves, predecessor: shares.predecessor.map(TryInto::try_into).transpose()? })
    }
}

/// Leaves `first` to before `end`.
///
/// # Errors
/// `Invalid` if there are no such leaves.
pub fn leaves_from_wire(first: u32, end: u32) -> Result<Range<usize>, WireError> {
    let range = first as usize..end as usize;
    if range.start > range.end || range.end > LEAVES {
        return Err(invalid("leaves", format!("there are no leaves {range:?}")));
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_round_trip() {
        let lease = Lease { unit: Unit::Prune(LayerIndex(3)), worker: WorkerId(7), attempt: Attempt(2) };
        let run = RunId("r-1".into());
        assert_eq!(lease_from_wire(lease_to_wire(&run, lease)), Ok((run, lease)));
    }

    #[test]
    fn a_run_id_cannot_climb_out_of_a_folder() {
        for bad in ["", "../x", "a/b", &"x".repeat(65)] {
            assert!(run_from_wire(bad.to_owned()).is_err(), "{bad}");
        }
    }

    #[test]
    fn shares_round_trip_and_nothing_is_given_twice() {
        let artifact = Artifact { name: "layers/0".into(), sha256: Digest::of(b"x"), bytes: 1 };
        let shares = Shares { leaves: vec![3..6, 8..8, 6..8], predecessor: Some(artifact) };
        assert_eq!(Shares::try_from(pb::Shares::from(shares.clone())), Ok(shares));
        for leaves in [vec![0..3, 2..4], vec![7..9, 0..1]] {
            let shares = Shares { leaves, predecessor: None };
            assert!(Shares::try_from(pb::Shares::from(shares)).is_err());
        }
        assert!(leaves_from_wire(4, 3).is_err());
    }

    #[test]
    fn sources_round_trip() {
        let artifact = Artifact { name: "layers/0".into(), sha256: Digest::of(b"x"), bytes: 1 };
        let source = Source {
            from: SourceFrom::Peer { endpoint: "http://127.0.0.1:1".into(), boundary: Boundary(4) },
            replay: vec![artifact],
        };
        let stored = SourceFrom::Stored { boundary: Boundary(8), artifact: source.replay[0].clone() };
        for source in [source, Source { from: stored, replay: Vec::new() }] {
            assert_eq!(Source::try_from(pb::Source::from(source.clone())), Ok(source));
        }
    }
}
