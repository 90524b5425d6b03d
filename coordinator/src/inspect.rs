//! Says what a checkpoint's weights look like: zeros, N:M conformity, and the change against another checkpoint.
//!
//! Reads a bounded number of rows at a time, whatever the model's size.

use std::collections::{BTreeMap, BTreeSet};

use espalier_common::checkpoint::cast::f32_from_bytes;
use espalier_common::checkpoint::{Checkpoint, CheckpointError, TensorHeader};
use espalier_common::pattern::Pattern;
use serde::Serialize;

/// Elements held at a time, of each checkpoint.
const CHUNK_ELEMENTS: usize = 1 << 20;
/// Patterns that are always looked for, as kept of every.
const COMMON_PATTERNS: [(usize, usize); 2] = [(2, 4), (4, 8)];

/// What a checkpoint looks like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// Every matrix, in the checkpoint's order.
    pub tensors: Vec<TensorInspection>,
    /// Sums over the matrices of one kind: `q_proj`, `embed_tokens`.
    pub kinds: BTreeMap<String, Totals>,
    /// Sums over all matrices.
    pub totals: Totals,
    /// Tensors whose elements are no floats; they are not looked at.
    pub other_tensors: Vec<String>,
    /// How the tensors differ from the other checkpoint's, if one was given.
    pub differences: Option<Differences>,
}

/// What one matrix looks like.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorInspection {
    /// Its name.
    pub name: String,
    /// Output rows and input columns.
    pub shape: [usize; 2],
    /// Its figures.
    #[serde(flatten)]
    pub totals: Totals,
    /// Of each pattern whose groups tile its rows, how many groups obey it.
    pub conformity: Vec<Conformity>,
}

/// How far a matrix obeys an N:M pattern.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conformity {
    /// Kept of every: `2:4`.
    pub pattern: String,
    /// Groups in the matrix.
    pub groups: u64,
    /// Groups with no more than the pattern's number of non-zeros.
    pub conforming: u64,
}

/// Sums over elements.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Totals {
    /// Elements.
    pub elements: u64,
    /// Elements that are 0 as stored.
    pub zeros: u64,
    /// Elements that are NaN or infinite.
    pub non_finite: u64,
    /// Share of zeros.
    pub sparsity: f64,
    /// ‖W' − W‖ / ‖W‖ over those matrices that the other checkpoint has in the same shape; W is the other's.
    /// Absent also if W is all zeros and W' is not.
    pub relative_change: Option<f64>,
    #[serde(skip)]
    change: Option<Change>,
}

/// Squared norms of the difference and of the other checkpoint's weights.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Change {
    difference: f64,
    reference: f64,
}

/// Tensors, matrices or not, that are not the same in both checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Differences {
    /// In both, with other values.
    pub changed: Vec<String>,
    /// In both, with another shape or element type.
    pub reshaped: Vec<String>,
    /// Only in the inspected one.
    pub added: Vec<String>,
    /// Only in the other one.
    pub missing: Vec<String>,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.elements += other.elements;
        self.zeros += other.zeros;
        self.non_finite += other.non_finite;
        if let Some(change) = other.change {
            let sum = self.change.get_or_insert_default();
            sum.difference += change.difference;
            sum.reference += change.reference;
        }
    }

    fn finish(mut self) -> Self {
        self.sparsity = if self.elements == 0 { 0.0 } else { self.zeros as f64 / self.elements as f64 };
        self.relative_change = self.change.and_then(|Change { difference, reference }| match difference {
            0.0 => Some(0.0),
            // A change from nothing has no relative size.
            _ if reference > 0.0 => Some((difference / reference).sqrt()),
            _ => None,
        });
        self
    }
}

/// Inspects all matrices of `checkpoint`; with `against`, compares all tensors. `pattern` is an N:M pattern to look for
/// beside 2:4 and 4:8.
///
/// # Errors
/// Those of reading either checkpoint.
pub fn inspect(
    checkpoint: &dyn Checkpoint,
    against: Option<&dyn Checkpoint>,
    pattern: Option<Pattern>,
) -> Result<Inspection, CheckpointError> {
    let mut patterns = COMMON_PATTERNS.to_vec();
    if let Some(Pattern::NofM { keep, of }) = pattern
        && !patterns.contains(&(keep, of))
    {
        patterns.push((keep, of));
    }
    let mut tensors = Vec::new();
    let mut kinds: BTreeMap<String, Totals> = BTreeMap::new();
    let mut all = Totals::default();
    let mut differences = Differences::default();
    for name in checkpoint.names() {
        let Some(header) = checkpoint.header(name) else { continue };
        let reference = against.and_then(|other| other.header(name).map(|header| (other, header)));
        let scan = scan(checkpoint, name, header, reference, &patterns)?;
        match reference {
            None if against.is_some() => differences.added.push(name.to_owned()),
            None => {}
            Some((_, other)) if other != header => differences.reshaped.push(name.to_owned()),
            Some(_) if scan.changed => differences.changed.push(name.to_owned()),
            Some(_) => {}
        }
        if let &[rows, columns] = header.shape.as_slice() {
            kinds.entry(kind(name).to_owned()).or_default().add(&scan.totals);
            all.add(&scan.totals);
            let (shape, totals) = ([rows, columns], scan.totals.finish());
            tensors.push(TensorInspection { name: name.to_owned(), shape, totals, conformity: scan.conformity });
        }
    }
    if let Some(other) = against {
        let present: BTreeSet<&str> = checkpoint.names().into_iter().collect();
        let missing = other.names().into_iter().filter(|name| !present.contains(name));
        differences.missing = missing.map(str::to_owned).collect();
    }
    Ok(Inspection {
        tensors,
        kinds: kinds.into_iter().map(|(kind, totals)| (kind, totals.finish())).collect(),
        totals: all.finish(),
        other_tensors: checkpoint.other_names().into_iter().map(str::to_owned).collect(),
        differences: against.map(|_| differences),
    })
}

/// The last part of a tensor's name before `.weight`.
fn kind(name: &str) -> &str {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    module.rsplit('.').next().unwrap_or(module)
}

struct Scan {
    totals: Totals,
    conformity: Vec<Conformity>,
    changed: bool,
}

/// Looks at one tensor, and at its reference if that has the same shape.
fn scan(
    checkpoint: &dyn Checkpoint,
    name: &str,
    header: &TensorHeader,
    reference: Option<(&dyn Checkpoint, &TensorHeader)>,
    patterns: &[(usize, usize)],
) -> Result<Scan, CheckpointError> {
    let reference = reference.filter(|(_, other)| other.shape == header.shape);
    let (rows, columns) = match header.shape.split_first() {
        Some((&rows, rest)) => (rows, rest.iter().product::<usize>()),
        None => (0, 0),
    };
    let tiling =
        patterns.iter().filter(|(_, of)| header.shape.len() == 2 && columns > 0 && columns.is_multiple_of(*of));
    let mut conformity: Vec<_> = tiling
        .map(|&(keep, of)| ((keep, of), Conformity { pattern: format!("{keep}:{of}"), groups: 0, conforming: 0 }))
        .collect();
    let mut totals = Totals { change: reference.map(|_| Change::default()), ..Totals::default() };
    let mut changed = false;
    let step = (CHUNK_ELEMENTS / columns.max(1)).max(1);
    for start in (0..rows).step_by(step) {
        let part = start..(start + step).min(rows);
        let bytes = checkpoint.read_rows(name, part.clone())?;
        let values = f32_from_bytes(header.dtype, &bytes);
        totals.elements += values.len() as u64;
        totals.zeros += values.iter().filter(|&&value| is_zero(value)).count() as u64;
        totals.non_finite += values.iter().filter(|value| !value.is_finite()).count() as u64;
        for ((keep, of), found) in &mut conformity {
            let groups = values.chunks_exact(*of);
            found.groups += groups.len() as u64;
            let conforms = |group: &&[f32]| group.iter().filter(|&&value| !is_zero(value)).count() <= *keep;
            found.conforming += groups.filter(conforms).count() as u64;
        }
        if let (Some((other, other_header)), Some(change)) = (reference, &mut totals.change) {
            let other_bytes = other.read_rows(name, part)?;
            changed |= other_header.dtype == header.dtype && other_bytes != bytes;
            for (&new, &old) in values.iter().zip(&f32_from_bytes(other_header.dtype, &other_bytes)) {
                change.difference += (f64::from(new) - f64::from(old)).powi(2);
                change.reference += f64::from(old).powi(2);
            }
        }
    }
    Ok(Scan { totals, conformity: conformity.into_iter().map(|(_, found)| found).collect(), changed })
}

fn is_zero(value: f32) -> bool {
    value.to_bits() << 1 == 0
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use espalier_common::checkpoint::cast::bytes_from_f32;
    use espalier_common::checkpoint::{CheckpointWriter, Dtype, open};

    use super::*;

    fn checkpoint(path: &Path, tensors: &[(&str, &[usize], &[f32])]) -> Arc<dyn Checkpoint> {
        let header = |shape: &[usize]| TensorHeader { dtype: Dtype::Bf16, shape: shape.to_vec() };
        let plan = tensors.iter().map(|(name, shape, _)| ((*name).to_owned(), header(shape))).collect();
        let mut writer = CheckpointWriter::create(path, 1 << 20, plan).unwrap();
        for (name, _, values) in tensors {
            writer.write(name, &bytes_from_f32(Dtype::Bf16, values)).unwrap();
        }
        writer.add_file("config.json", b"{}").unwrap();
        writer.finish().unwrap();
        open(path).unwrap()
    }

    #[test]
    fn zeros_conformity_and_change_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        let (q0, q1, norm) = ("layers.0.q_proj.weight", "layers.1.q_proj.weight", "norm.weight");
        let dense = checkpoint(
            &directory.path().join("dense"),
            &[
                (q0, &[2, 4], &[3.0, 4.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0]),
                (q1, &[1, 3], &[1.0, 2.0, 2.0]),
                (norm, &[2], &[1.0, 1.0]),
                ("gone.weight", &[1, 1], &[1.0]),
                ("cut.weight", &[2, 1], &[1.0, 1.0]),
            ],
        );
        let pruned = checkpoint(
            &directory.path().join("pruned"),
            &[
                (q0, &[2, 4], &[3.0, 4.0, 0.0, -0.0, 2.0, 2.0, 1.0, 0.0]),
                (q1, &[1, 3], &[1.0, 2.0, f32::NAN]),
                (norm, &[2], &[1.0, 0.0]),
                ("new.weight", &[1, 1], &[0.0]),
                ("cut.weight", &[1, 1], &[1.0]),
            ],
        );
        let pattern = Pattern::NofM { keep: 1, of: 3 };
        let found = inspect(pruned.as_ref(), Some(dense.as_ref()), Some(pattern)).unwrap();
        let first = &found.tensors[0];
        assert_eq!((first.totals.elements, first.totals.zeros, first.totals.non_finite), (8, 3, 0));
        assert_eq!(first.conformity, [Conformity { pattern: "2:4".to_owned(), groups: 2, conforming: 1 }]);
        let change = first.totals.relative_change.unwrap();
        assert!((change - (3.0f64 / 37.0).sqrt()).abs() < 1e-12, "{change}");
        assert_eq!(found.tensors[1].conformity, [Conformity { pattern: "1:3".to_owned(), groups: 1, conforming: 0 }]);
        let kind = found.kinds["q_proj"];
        assert_eq!((kind.elements, kind.zeros, kind.non_finite), (11, 3, 1));
        assert_eq!((found.totals.elements, found.totals.zeros), (13, 4), "vectors are not counted");
        let differences = found.differences.unwrap();
        assert_eq!(differences.changed, [q0, q1, norm]);
        assert_eq!(differences.reshaped, ["cut.weight"]);
        assert_eq!(differences.added, ["new.weight"]);
        assert_eq!(differences.missing, ["gone.weight"]);
    }

    #[test]
    fn checkpoint_does_not_differ_from_itself() {
        let directory = tempfile::tempdir().unwrap();
        let rows = 3 * CHUNK_ELEMENTS / 1000;
        let values: Vec<f32> = (0..rows * 1000).map(|index| (index % 4) as f32).collect();
        let same = checkpoint(&directory.path().join("same"), &[("w.weight", &[rows, 1000], &values)]);
        let found = inspect(same.as_ref(), Some(same.as_ref()), None).unwrap();
        assert_eq!(found.differences, Some(Differences::default()));
        assert_eq!(found.totals.relative_change, Some(0.0));
        assert_eq!(found.totals.zeros, rows as u64 * 250);
        assert_eq!(found.tensors[0].conformity[0].conforming, 0);
        assert_eq!(found.tensors[0].conformity[1].groups, rows as u64 * 125);
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["tensors"][0]["sparsity"], 0.25);
        assert!(inspect(same.as_ref(), None, None).unwrap().differences.is_none());
    }
}
