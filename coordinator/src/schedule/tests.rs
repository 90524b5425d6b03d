//! Schedules, written out and drawn at random.

use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::report::Artifact;
use proptest::prelude::*;

use super::*;

const A: WorkerId = WorkerId(1);
const B: WorkerId = WorkerId(2);

fn chain(layers: usize) -> Scheduler {
    Scheduler::new(Shape::PruneChain { layer_bytes: vec![1; layers] }, Limits::default())
}

fn joined(worker: WorkerId) -> Event {
    Event::WorkerJoined { worker, speed: 1, more_come: false }
}

fn started(actions: &[Action]) -> Vec<(Lease, Origin)> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Start { lease, origin, .. } => Some((*lease, *origin)),
            _ => None,
        })
        .collect()
}

fn outcome(unit: Unit) -> Outcome {
    match unit {
        Unit::Prune(layer) => Outcome::Pruned {
            artifact: Artifact {
                name: format!("layers/{layer}"),
                sha256: Digest::of(&layer.0.to_le_bytes()),
                bytes: 1,
            },
            kept: None,
            sublayers: Vec::new(),
            phases: Vec::new(),
            boundary: None,
            assistants_lost: 0,
            links: Vec::new(),
        },
        Unit::Forward(_) => Outcome::Forwarded { phases: Vec::new() },
        Unit::Evaluate(_) => Outcome::Evaluated { window_nll: vec![1.0], phases: Vec::new() },
    }
}

/// What a worker says when a unit is done: it then holds the next boundary.
fn done(lease: Lease) -> Event {
    let held = match lease.unit {
        Unit::Prune(layer) | Unit::Forward(layer) => vec![Boundary(layer.0 + 1)],
        Unit::Evaluate(_) => Vec::new(),
    };
    Event::UnitDone { lease, outcome: outcome(lease.unit), held }
}

fn fault(class: FaultClass) -> Fault {
    Fault { class, message: "it broke".to_owned() }
}

#[test]
fn a_chain_goes_layer_by_layer_and_moves_to_the_next_owner() {
    let mut scheduler = chain(4);
    let mut running = started(&scheduler.step(joined(A)));
    assert!(started(&scheduler.step(joined(B))).is_empty());
    let mut seen = Vec::new();
    while let Some((lease, origin)) = running.pop() {
        seen.push((lease.unit, lease.worker, origin));
        running = started(&scheduler.step(done(lease)));
    }
    let held = |boundary, by| Origin::Held { boundary: Boundary(boundary), by };
    let prune = |layer| Unit::Prune(LayerIndex(layer));
    assert_eq!(
        seen,
        [
            (prune(0), A, Origin::Tokens),
            (prune(1), A, held(1, A)),
            (prune(2), B, held(2, A)),
            (prune(3), B, held(3, B)),
        ]
    );
    assert!(scheduler.is_finished());
}

fn assistants(actions: &[Action]) -> Vec<WorkerId> {
    let named = actions.iter().filter_map(|action| match action {
        Action::Start { assistants, .. } => Some(assistants.clone()),
        _ => None,
    });
    named.flatten().collect()
}

fn together(layers: usize) -> Scheduler {
    Scheduler::new(Shape::PruneTogether { layer_bytes: vec![1; layers], most_hands: 8 }, Limits::default())
}

/// The owner of the layer that begins, and who has which leaves.
fn shared(actions: &[Action]) -> (Lease, Vec<(WorkerId, std::ops::Range<usize>)>) {
    let begun = actions.iter().find_map(|action| match action {
        Action::Start { lease, assistants, shares: Some(shares), .. } => {
            Some((*lease, assistants.iter().copied().zip(shares.iter().cloned()).collect()))
        }
        _ => None,
    });
    begun.expect("a layer begins, and it is shared")
}

#[test]
fn shares_and_their_owner_stay_from_layer_to_layer() {
    let mut scheduler = together(3);
    let first = Event::WorkerJoined { worker: A, speed: 1, more_come: true };
    assert!(scheduler.step(first).is_empty());
    let mut actions = scheduler.step(joined(B));
    for layer in 0..3 {
        let (lease, shares) = shared(&actions);
        assert_eq!((lease.unit, lease.worker, shares), (Unit::Prune(LayerIndex(layer)), A, vec![(B, 0..4)]));
        assert_eq!(started(&actions)[0].1, Origin::Tokens, "where a share begins that nobody kept");
        actions = scheduler.step(done(lease));
    }
    assert!(scheduler.is_finished());
    let everything = |action: &&Action| matches!(action, Action::Release { boundaries, .. } if boundaries.len() == 3);
    assert_eq!(actions.iter().filter(everything).count(), 2, "{actions:?}");
}

#[test]
fn a_lost_share_goes_to_whoever_is_left_and_a_late_worker_only_helps_to_solve() {
    const C: WorkerId = WorkerId(3);
    let mut scheduler = together(5);
    let _ = scheduler.step(Event::WorkerJoined { worker: A, speed: 1, more_come: true });
    let (lease, _) = shared(&scheduler.step(joined(B)));
    let (lease, _) = shared(&scheduler.step(done(lease)));
    let (lease, _) = shared(&scheduler.step(done(lease)));
    let _ = scheduler.step(Event::WorkerJoined { worker: C, speed: 9, more_come: false });
    let (lease, shares) = shared(&scheduler.step(done(lease)));
    assert_eq!((lease.worker, shares), (A, vec![(B, 0..4), (C, 8..8)]), "three layers to make up for, two to go");
    // Its owner is gone: the unit is leased again at once, and its leaves are made again by others.
    let (lease, shares) = shared(&scheduler.step(Event::WorkerLost { worker: A }));
    assert_eq!((lease.worker, lease.attempt, shares), (B, Attempt(2), vec![(C, 4..8)]));
}

#[test]
fn whoever_has_nothing_to_do_when_a_layer_begins_assists_until_it_ends() {
    const C: WorkerId = WorkerId(3);
    let mut scheduler = chain(5);
    let first = scheduler.step(joined(A));
    assert_eq!(assistants(&first), []);
    // In the middle of a layer nobody joins it.
    assert_eq!(scheduler.step(joined(B)), []);
    let second = scheduler.step(done(started(&first)[0].0));
    assert_eq!(assistants(&second), [B]);
    // An assistant that is lost is gone, and nothing else happens.
    assert_eq!(scheduler.step(joined(C)), []);
    assert_eq!(scheduler.step(Event::WorkerLost { worker: B }), []);
    let third = scheduler.step(done(started(&second)[0].0));
    assert_eq!(assistants(&third), [if started(&third)[0].0.worker == A { C } else { A }]);
    // A lost owner leaves its layer to its assistant, and a fault to whoever there is.
    let owner = started(&third)[0].0.worker;
    let again = scheduler.step(Event::WorkerLost { worker: owner });
    assert_eq!((started(&again).len(), assistants(&again)), (1, vec![]));
    let _ = scheduler.step(joined(B));
    let lease = started(&again)[0].0;
    let retried = scheduler.step(Event::UnitFailed { lease, fault: fault(FaultClass::RetryHere) });
    assert_eq!(assistants(&retried).len(), 1);
}

#[test]
fn the_first_layer_waits_for_those_who_begin_together_but_not_for_long() {
    let mut scheduler = chain(2);
    assert_eq!(scheduler.step(Event::WorkerJoined { worker: A, speed: 1, more_come: true }), []);
    let begun = scheduler.step(joined(B));
    assert_eq!((started(&begun).len(), assistants(&begun).len()), (1, 1));
    let mut scheduler = chain(2);
    assert_eq!(scheduler.step(Event::WorkerJoined { worker: A, speed: 1, more_come: true }), []);
    assert_eq!(started(&scheduler.step(Event::Tick { now: Millis(500) })).len(), 1);
}

#[test]
fn layers_apart_have_no_assistants() {
    let mut scheduler = Scheduler::new(Shape::PruneApart { layer_bytes: vec![1; 2] }, Limits::default());
    let first = scheduler.step(joined(A));
    let second = scheduler.step(joined(B));
    assert_eq!((assistants(&first), assistants(&second)), (vec![], vec![]));
}

#[test]
fn a_faster_worker_gets_more_layers() {
    let mut scheduler = chain(6);
    let _ = scheduler.step(Event::WorkerJoined { worker: A, speed: 100, more_come: false });
    let _ = scheduler.step(Event::WorkerJoined { worker: B, speed: 200, more_come: false });
    let owned = |worker| scheduler.owners.values().filter(|owner| **owner == worker).count();
    assert_eq!((owned(A), owned(B)), (2, 4));
}

#[test]
fn a_lease_is_recorded_before_it_is_started() {
    let actions = chain(1).step(joined(A));
    assert!(matches!(actions[..], [Action::Record(Record::Leased { .. }), Action::Start { .. }]), "{actions:?}");
}

#[test]
fn reply_under_a_lost_lease_is_dropped() {
    let mut scheduler = chain(1);
    let (first, _) = started(&scheduler.step(joined(A)))[0];
    let _ = scheduler.step(Event::WorkerLost { worker: A });
    let (second, _) = started(&scheduler.step(joined(B)))[0];
    assert_eq!(second.attempt, Attempt(2));
    assert_eq!(scheduler.step(done(first)), []);
    let actions = scheduler.step(done(second));
    assert!(matches!(&actions[0], Action::Record(Record::Committed { lease, .. }) if *lease == second));
    assert_eq!(actions.last(), Some(&Action::Finish));
}

#[test]
fn lost_hidden_states_are_computed_again_from_the_tokens() {
    let mut scheduler = chain(3);
    let (lease, _) = started(&scheduler.step(joined(A)))[0];
    let (lease, _) = started(&scheduler.step(done(lease)))[0];
    assert_eq!(lease.unit, Unit::Prune(LayerIndex(1)));
    let _ = scheduler.step(Event::WorkerLost { worker: A });
    let (lease, origin) = started(&scheduler.step(joined(B)))[0];
    assert_eq!((lease.unit, origin), (Unit::Prune(LayerIndex(1)), Origin::Tokens));
}

#[test]
fn dense_layers_are_pruned_side_by_side() {
    let shape = Shape::PruneApart { layer_bytes: vec![1; 4] };
    let mut scheduler = Scheduler::new(shape, Limits::default());
    let mut queue = started(&scheduler.step(joined(A)));
    queue.extend(started(&scheduler.step(joined(B))));
    let mut most = 0;
    let mut finished = false;
    while let Some((lease, _)) = queue.pop() {
        most = most.max(queue.len() + 1);
        let actions = scheduler.step(done(lease));
        finished |= actions.contains(&Action::Finish);
        queue.splice(0..0, started(&actions));
    }
    assert!(finished);
    assert_eq!(most, 2);
}

#[test]
fn boundaries_are_released_once_nobody_needs_them() {
    let mut scheduler = chain(2);
    let (first, _) = started(&scheduler.step(joined(A)))[0];
    let (second, _) = started(&scheduler.step(done(first)))[0];
    let actions = scheduler.step(Event::UnitDone { lease: second, outcome: outcome(second.unit), held: Vec::new() });
    assert!(actions.contains(&Action::Release { worker: A, boundaries: vec![Boundary(1)] }));
}

#[test]
fn a_rejected_job_ends_at_once_and_a_passing_fault_goes_elsewhere() {
    let mut scheduler = chain(1);
    let _ = scheduler.step(joined(A));
    let (lease, _) = {
        let mut fresh = chain(1);
        started(&fresh.step(joined(A)))[0]
    };
    let _ = scheduler.step(joined(B));
    let actions = scheduler.step(Event::UnitFailed { lease, fault: fault(FaultClass::RetryElsewhere) });
    assert_eq!(started(&actions)[0].0.worker, B);
    let lease = started(&actions)[0].0;
    let actions = scheduler.step(Event::UnitFailed { lease, fault: fault(FaultClass::Reject) });
    assert!(matches!(actions.last(), Some(Action::Fail(Failure::Unit { .. }))));
    assert_eq!(scheduler.step(Event::Tick { now: Millis(1) }), []);
}

#[test]
fn a_passing_fault_is_tried_again_by_the_same_worker_after_a_wait() {
    let mut scheduler = chain(1);
    let (first, _) = started(&scheduler.step(joined(A)))[0];
    let _ = scheduler.step(joined(B));
    let actions = scheduler.step(Event::UnitFailed { lease: first, fault: fault(FaultClass::RetryHere) });
    assert!(started(&actions).is_empty(), "{actions:?}");
    assert!(
        started(&scheduler.step(Event::Tick { now: Millis(499) })).is_empty(),
        "the shortest wait is half a second"
    );
    let again = started(&scheduler.step(Event::Tick { now: Millis(1000) }));
    assert_eq!(again[0].0, Lease { attempt: Attempt(2), ..first });
}

#[test]
fn a_unit_that_fails_wherever_it_goes_ends_the_run_with_its_cause() {
    let mut scheduler = chain(1);
    let mut running = started(&scheduler.step(joined(A)));
    let _ = scheduler.step(joined(B));
    let _ = scheduler.step(joined(WorkerId(3)));
    let _ = scheduler.step(joined(WorkerId(4)));
    let mut had = BTreeSet::new();
    let (mut now, mut failures) = (0, 0);
    let end = loop {
        let (lease, _) = running[0];
        had.insert(lease.worker);
        failures += 1;
        let actions = scheduler.step(Event::UnitFailed { lease, fault: fault(FaultClass::RetryHere) });
        if let Some(Action::Fail(failure)) = actions.last() {
            break failure.clone();
        }
        running = started(&actions);
        while running.is_empty() {
            now += 500;
            assert!(now < 600_000, "nobody has it any more");
            let all: Vec<WorkerId> = scheduler.workers().collect();
            for worker in all {
                let _ = scheduler.step(Event::Heartbeat { worker });
            }
            running = started(&scheduler.step(Event::Tick { now: Millis(now) }));
        }
    };
    // Its owner has it until it is given up on, then whoever is free.
    assert!(had.len() >= 3 && failures == 9, "{failures} failures on {had:?}");
    assert!(
        matches!(end, Failure::Unit { attempts: 9, fault: Fault { class: FaultClass::RetryHere, .. }, .. }),
        "{end:?}"
    );
}

#[test]
fn a_unit_that_three_workers_cannot_do_ends_the_run() {
    let mut scheduler = chain(1);
    let mut running = started(&scheduler.step(joined(A)));
    for worker in [B, WorkerId(3), WorkerId(4)] {
        let _ = scheduler.step(joined(worker));
    }
    for _ in 0..2 {
        let event = Event::UnitFailed { lease: running[0].0, fault: fault(FaultClass::RetryElsewhere) };
        running = started(&scheduler.step(event));
    }
    let event = Event::UnitFailed { lease: running[0].0, fault: fault(FaultClass::RetryElsewhere) };
    let actions = scheduler.step(event);
    assert!(matches!(actions.last(), Some(Action::Fail(Failure::Unit { attempts: 3, .. }))), "{actions:?}");
}

#[test]
fn a_unit_that_its_only_worker_fails_at_ends_the_run_with_its_cause() {
    for class in [FaultClass::RetryHere, FaultClass::RetryElsewhere] {
        let mut scheduler = chain(1);
        let mut running = started(&scheduler.step(joined(A)));
        for wait in [1000, 5000] {
            let _ = scheduler.step(Event::Heartbeat { worker: A });
            let actions = scheduler.step(Event::UnitFailed { lease: running[0].0, fault: fault(class) });
            assert!(started(&actions).is_empty(), "{actions:?}");
            running = started(&scheduler.step(Event::Tick { now: Millis(wait) }));
        }
        let actions = scheduler.step(Event::UnitFailed { lease: running[0].0, fault: fault(class) });
        assert!(matches!(actions.last(), Some(Action::Fail(Failure::Unit { attempts: 3, .. }))), "{actions:?}");
    }
}

#[test]
fn a_silent_worker_is_lost_and_an_empty_cluster_is_given_up() {
    let mut scheduler = chain(1);
    let _ = scheduler.step(joined(A));
    let _ = scheduler.step(Event::Tick { now: Millis(16_000) });
    assert_eq!(scheduler.workers().count(), 0);
    let actions = scheduler.step(Event::Tick { now: Millis(77_000) });
    assert_eq!(actions, [Action::Fail(Failure::NoWorkers { waited_seconds: 61 })]);
}

#[test]
fn a_schedule_that_begins_late_is_as_patient_as_any() {
    let mut scheduler = chain(1).starting_at(Millis(500_000));
    assert_eq!(scheduler.step(Event::Tick { now: Millis(500_500) }), []);
    let _ = scheduler.step(joined(A));
    let _ = scheduler.step(Event::Tick { now: Millis(501_000) });
    assert_eq!(scheduler.workers().count(), 1);
}

#[test]
fn nothing_left_to_do_finishes_without_workers() {
    let records = [Record::Committed {
        lease: Lease { unit: Unit::Prune(LayerIndex(0)), worker: A, attempt: Attempt(1) },
        outcome: outcome(Unit::Prune(LayerIndex(0))),
    }];
    let shape = Shape::PruneChain { layer_bytes: vec![1] };
    let mut scheduler = Scheduler::replay(shape, Limits::default(), &records);
    assert_eq!(scheduler.step(Event::Tick { now: Millis(0) }), [Action::Finish]);
}

/// What may happen next in a random schedule.
#[derive(Debug, Clone)]
enum Chance {
    Join,
    Lose(usize),
    Done(usize),
    Fail(usize),
    Duplicate(usize),
    Restart,
    Wait(u64),
}

fn chance() -> impl Strategy<Value = Chance> {
    prop_oneof![
        2 => Just(Chance::Join),
        1 => any::<usize>().prop_map(Chance::Lose),
        8 => any::<usize>().prop_map(Chance::Done),
        1 => any::<usize>().prop_map(Chance::Fail),
        2 => any::<usize>().prop_map(Chance::Duplicate),
        1 => Just(Chance::Restart),
        1 => (0u64..4000).prop_map(Chance::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    /// Whatever dies, joins, repeats itself or restarts: nothing is committed twice, nothing out of order, and with a worker
    /// that stays everything gets done.
    #[test]
    fn every_schedule_commits_each_unit_once(dense in any::<bool>(), layers in 1usize..7, chances in prop::collection::vec(chance(), 0..80)) {
        let layer_bytes = vec![1; layers];
        let shape = if dense { Shape::PruneApart { layer_bytes } } else { Shape::PruneChain { layer_bytes } };
        let limits = Limits { attempts: u32::MAX, poisoned_on: u32::MAX, ..Limits::default() };
        let mut scheduler = Scheduler::new(shape.clone(), limits);
        let mut journal: Vec<Record> = Vec::new();
        let (mut running, mut past): (Vec<Lease>, Vec<Lease>) = (Vec::new(), Vec::new());
        let (mut now, mut next_worker) = (0u64, 1u64);
        let tail = std::iter::once(Chance::Join).chain(std::iter::repeat_n(Chance::Done(0), 4 * layers + 2));
        for chance in chances.into_iter().chain(tail) {
            let pick = |at: usize, of: &[Lease]| of.get(at % of.len().max(1)).copied();
            let event = match chance {
                Chance::Join => { next_worker += 1; Some(joined(WorkerId(next_worker))) }
                Chance::Lose(at) => {
                    let workers: Vec<WorkerId> = scheduler.workers().collect();
                    workers.get(at % workers.len().max(1)).map(|worker| Event::WorkerLost { worker: *worker })
                }
                Chance::Done(at) => pick(at, &running).map(done),
                Chance::Fail(at) => pick(at, &running).map(|lease| Event::UnitFailed { lease, fault: fault(FaultClass::RetryElsewhere) }),
                Chance::Duplicate(at) => pick(at, &past).map(done),
                Chance::Restart => {
                    scheduler = Scheduler::replay(shape.clone(), limits, &journal);
                    past.append(&mut running);
                    None
                }
                Chance::Wait(millis) => { now += millis; Some(Event::Tick { now: Millis(now) }) }
            };
            let Some(event) = event else { continue };
            if let Event::UnitDone { lease, .. } | Event::UnitFailed { lease, .. } = &event {
                running.retain(|other| other != lease);
                past.push(*lease);
            }
            for action in scheduler.step(event) {
                match action {
                    Action::Record(record) => {
                        if let Record::Committed { lease, .. } = &record {
                            let twice = journal.iter().any(|old| matches!(old, Record::Committed { lease: other, .. } if other.unit == lease.unit));
                            prop_assert!(!twice, "{} committed twice", lease.unit);
                        }
                        journal.push(record);
                    }
                    Action::Start { lease, origin, .. } => {
                        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else { panic!("no evaluation here") };
                        prop_assert!(origin.boundary().0 <= layer.0);
                        running.push(lease);
                    }
                    Action::Release { .. } | Action::Discard { .. } | Action::Finish => {}
                    Action::Fail(failure) => prop_assert!(matches!(failure, Failure::NoWorkers { .. }), "{failure:?}"),
                }
            }
            prop_assert_eq!(invariants::check(&scheduler), Ok(()));
            // What can be rebuilt from the journal is what is committed.
            let rebuilt = Scheduler::replay(shape.clone(), limits, &journal);
            let committed = |s: &Scheduler| s.units().filter(|(_, state)| **state == UnitState::Committed).map(|(unit, _)| unit).collect::<Vec<_>>();
            prop_assert_eq!(committed(&rebuilt), committed(&scheduler));
        }
        prop_assert!(scheduler.is_finished() || scheduler.workers().count() == 0 || scheduler.ended);
    }
}
