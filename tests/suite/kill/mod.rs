//! The kill matrix: the coordinator or a worker is killed behind every kind of record and in the middle of every kind of
//! transfer, on one machine and in a cluster, for each family in both propagations; what comes out is the same.

mod case;
mod point;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use anyhow::{Result, ensure};
use harness::TINY_MODELS;
use harness::process::Workplace;

use self::case::{Case, Scene, Victim};
pub(crate) use self::case::{Job, lost_nothing};
use self::point::{Kind, Point, Transfer};

const PROPAGATIONS: [&str; 2] = ["pruned", "dense"];

/// The matrix. Every point is there for every victim in every scene that has it; the models and propagations take turns,
/// so that each of a point's cases has another.
fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for (at, point) in Point::all().into_iter().enumerate() {
        for (turn, (victim, scene)) in [
            (Victim::Coordinator, Scene::Local),
            (Victim::Worker, Scene::Local),
            (Victim::Coordinator, Scene::Cluster),
            (Victim::Worker, Scene::Cluster),
        ]
        .into_iter()
        .enumerate()
        {
            if !point.has(victim, scene == Scene::Cluster) {
                continue;
            }
            let model = TINY_MODELS[(at + turn) % 3];
            let propagation = if point.needs_chain() { "pruned" } else { PROPAGATIONS[(at + turn / 2 + turn) % 2] };
            let job = Job { model, propagation, is_surveyed: point.needs_survey() };
            cases.push(Case { point, victim, scene, job });
        }
    }
    cases
}

/// Runs the cases of one model, propagation and scene; each undisturbed run is computed once.
fn kill_all(model: &str, propagation: &str, scene: Scene) {
    let mut references: BTreeMap<Job, Workplace> = BTreeMap::new();
    let mut failures = Vec::new();
    let chosen = |case: &Case| case.job.model == model && case.job.propagation == propagation && case.scene == scene;
    for case in matrix().into_iter().filter(chosen) {
        let result = one(&case, &mut references);
        if let Err(error) = result {
            failures.push(format!("{case:?}: {error:#}"));
        }
    }
    assert!(failures.is_empty(), "{} cases failed:\n{}", failures.len(), failures.join("\n"));
}

fn one(case: &Case, references: &mut BTreeMap<Job, Workplace>) -> Result<()> {
    let reference = match references.entry(case.job) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(case.job.undisturbed()?),
    };
    case.run(reference)
}

/// One test for each model, propagation and scene, so that they run side by side.
macro_rules! kills {
    ($($name:ident: $model:literal, $propagation:literal, $scene:ident;)+) => {
        const TESTED: &[(&str, &str, Scene)] = &[$(($model, $propagation, Scene::$scene)),+];
        $(#[test]
        fn $name() {
            kill_all($model, $propagation, Scene::$scene);
        })+
    };
}

kills! {
    llama_loses_nothing_in_pruned_propagation_on_one_machine: "llama-tiny", "pruned", Local;
    llama_loses_nothing_in_pruned_propagation_in_a_cluster: "llama-tiny", "pruned", Cluster;
    llama_loses_nothing_in_dense_propagation_on_one_machine: "llama-tiny", "dense", Local;
    llama_loses_nothing_in_dense_propagation_in_a_cluster: "llama-tiny", "dense", Cluster;
    opt_loses_nothing_in_pruned_propagation_on_one_machine: "opt-tiny", "pruned", Local;
    opt_loses_nothing_in_pruned_propagation_in_a_cluster: "opt-tiny", "pruned", Cluster;
    opt_loses_nothing_in_dense_propagation_on_one_machine: "opt-tiny", "dense", Local;
    opt_loses_nothing_in_dense_propagation_in_a_cluster: "opt-tiny", "dense", Cluster;
    qwen2_loses_nothing_in_pruned_propagation_on_one_machine: "qwen2-tiny", "pruned", Local;
    qwen2_loses_nothing_in_pruned_propagation_in_a_cluster: "qwen2-tiny", "pruned", Cluster;
    qwen2_loses_nothing_in_dense_propagation_on_one_machine: "qwen2-tiny", "dense", Local;
    qwen2_loses_nothing_in_dense_propagation_in_a_cluster: "qwen2-tiny", "dense", Cluster;
}

#[test]
fn the_matrix_has_every_record_every_transfer_and_every_victim() {
    let cases = matrix();
    let has = |point: Point, victim: Victim| cases.iter().any(|case| case.point == point && case.victim == victim);
    for victim in [Victim::Coordinator, Victim::Worker] {
        for kind in Kind::ALL {
            assert!(has(Point::Behind(*kind), victim), "{victim:?} is never killed behind {kind:?}");
        }
        for transfer in Transfer::ALL {
            assert!(has(Point::During(*transfer), victim), "{victim:?} is never killed during {transfer:?}");
        }
    }
    assert!(cases.len() >= 60, "{} cases", cases.len());
    for case in &cases {
        let tested = (case.job.model, case.job.propagation, case.scene);
        assert!(TESTED.contains(&tested), "nothing runs {case:?}");
    }
}

/// The records of an undisturbed run are spelled as the matrix waits for them.
#[test]
fn an_undisturbed_run_goes_through_the_matrix_records() {
    let job = Job { model: "llama-tiny", propagation: "pruned", is_surveyed: true };
    let workplace = job.undisturbed().unwrap();
    let check = || -> Result<()> {
        let text = std::fs::read_to_string(workplace.path().join("run/journal"))?;
        let seen: Vec<Kind> = crate::past::records(&workplace.path().join("run")).iter().filter_map(Kind::of).collect();
        let never = [Kind::SurveyFailed, Kind::PruneFailed, Kind::EvaluateFailed, Kind::Stopped];
        for kind in Kind::ALL.iter().filter(|kind| !never.contains(kind)) {
            let (spelled, number) = kind.spelled();
            let count = text.lines().filter(|line| line.contains(spelled)).count();
            let expected = seen.iter().filter(|seen| *seen == kind).count();
            ensure!(count == expected && count >= number as usize, "{kind:?}: {count} of {expected} lines");
        }
        Ok(())
    };
    check().unwrap();
}
