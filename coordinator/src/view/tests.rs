//! What a view makes of events.

use espalier_common::ids::{LayerIndex, RunId};

use super::*;

const A: WorkerId = WorkerId(1);
const B: WorkerId = WorkerId(2);

fn entry(layer: u32, kind: &str, error: f64) -> SublayerEntry {
    serde_json::from_value(serde_json::json!({
        "layer": layer, "name": format!("model.layers.{layer}.{kind}.weight"), "rel_error": error, "sparsity": 0.5,
        "zeros": 8, "elements": 16, "seconds": 0.25, "iterations": 1, "damping": 0.01, "damping_raised": 0,
        "dead_channels": 0, "worker": 1,
    }))
    .unwrap()
}

fn prune(layer: u32) -> Unit {
    Unit::Prune(LayerIndex(layer))
}

fn started(layer: u32, worker: WorkerId) -> RunEvent {
    RunEvent::Started { unit: prune(layer), worker }
}

fn committed(layer: u32, worker: WorkerId) -> RunEvent {
    RunEvent::Committed {
        unit: prune(layer),
        worker,
        mean_error: Some(0.5),
        sublayers: vec![entry(layer, "q_proj", 0.25), entry(layer, "o_proj", 0.75)],
        phases: vec![PhaseSeconds { phase: "solve".to_owned(), seconds: 2.0, flops: 8.0 }],
        assistants_lost: 0,
    }
}

fn opened(committed: usize, sublayers: Vec<SublayerEntry>) -> RunEvent {
    let (run, url) = (RunId("r".to_owned()), "runs/r".to_owned());
    RunEvent::Opened { run, url, committed, about: None, sublayers, phases: Vec::new() }
}

fn seen(events: &[(u64, RunEvent)]) -> RunView {
    let mut view = RunView::default();
    events.iter().for_each(|(at, event)| view.apply(*at, event));
    view
}

fn beginning(layers: usize) -> Vec<(u64, RunEvent)> {
    let joined = |worker: WorkerId| RunEvent::WorkerJoined { worker, name: format!("w{worker}") };
    vec![
        (1000, opened(0, Vec::new())),
        (1000, RunEvent::Phase { phase: Phase::Prune { layers } }),
        (1000, joined(A)),
        (1000, joined(B)),
    ]
}

#[test]
fn layers_that_are_done_tell_when_the_rest_will_be() {
    let mut events = beginning(4);
    events.extend([(1000, started(0, A)), (3000, committed(0, A)), (3000, started(1, A))]);
    let view = seen(&events);
    let head = view.head();
    assert_eq!((head.state, head.committed, head.layers), (State::Running, 1, Some(4)));
    assert_eq!(head.eta, Some(9000), "three layers of two seconds each are left");
    assert_eq!((head.zeros, head.elements, head.seconds_by_phase["solve"]), (16, 32, 2.0));
    assert_eq!(head.kinds, ["q_proj", "o_proj"]);
    assert_eq!(view.open().len(), 1);
}

#[test]
fn a_resumed_run_expects_its_end_by_this_life_alone() {
    let before = vec![entry(0, "q_proj", 0.1), entry(0, "o_proj", 0.1), entry(1, "q_proj", 0.1)];
    let view = seen(&[
        (0, opened(2, before)),
        (5000, RunEvent::Phase { phase: Phase::Prune { layers: 4 } }),
        (5000, started(2, A)),
        (6000, committed(2, A)),
    ]);
    assert_eq!((view.layers().len(), view.head().committed, view.head().committed_before), (3, 3, 2));
    assert_eq!(view.head().eta, Some(7000));
}

#[test]
fn waiting_for_workers_is_one_phase_however_often_it_is_told() {
    let waiting = |here| RunEvent::Phase { phase: Phase::AwaitWorkers { here, wanted: 3 } };
    let mut view = seen(&[(0, opened(0, Vec::new())), (1000, waiting(0)), (2000, waiting(2))]);
    let head = view.head();
    assert_eq!((head.phase_done, head.phases.len()), (2, 1));
    assert_eq!(
        (head.phases[0].title.as_str(), head.phases[0].total, head.phases[0].from),
        ("waiting for workers", 3, 1000)
    );
    view.apply(3000, &RunEvent::Phase { phase: Phase::Inspect });
    let head = view.head();
    assert_eq!((head.phase_done, head.phases.len(), head.phases[0].to), (0, 2, Some(3000)));
    assert_eq!(Phase::AwaitWorkers { here: 2, wanted: 3 }.told(), "waiting for workers: 2 of 3 are here");
}

#[test]
fn a_lost_workers_unit_ends_and_is_counted_as_tried_again() {
    let mut events = beginning(2);
    let lost = RunEvent::WorkerLost { worker: A, name: "w1".to_owned(), reason: "it is gone".to_owned() };
    let help = RunEvent::Assisted { unit: prune(0), worker: A, by: vec![B] };
    events.extend([(1000, started(0, A)), (1000, help), (2000, lost), (2000, started(0, B)), (4000, committed(0, B))]);
    let view = seen(&events);
    let ends: Vec<_> =
        view.since(&mut Cursor::default()).spans.items.into_iter().map(|span| (span.kind, span.end)).collect();
    let expected = [("prune", "lost"), ("assist", "lost"), ("prune", "done")];
    assert_eq!(ends, expected.map(|(kind, end)| (kind.to_owned(), end.to_owned())));
    assert_eq!((view.retries(), view.head().workers_lost), (1, 1));
    assert!(view.open().is_empty());
}

#[test]
fn whoever_follows_gets_what_is_new_and_after_a_report_everything() {
    let mut events = beginning(2);
    events.extend([(1000, started(0, A)), (2000, committed(0, A))]);
    let mut view = seen(&events);
    let mut cursor = Cursor::default();
    let all = view.since(&mut cursor);
    assert_eq!((all.layers.from, all.layers.items.len(), all.spans.items.len()), (0, 1, 1));
    assert_eq!(view.since(&mut cursor).layers, Part { from: 1, items: Vec::new() });
    view.apply(3000, &started(1, B));
    view.apply(4000, &committed(1, B));
    let more = view.since(&mut cursor);
    assert_eq!((more.layers.from, more.layers.items[0].layer, more.log.items.len()), (1, 1, 1));
    view.apply(5000, &RunEvent::Ended { reason: "<b>disk</b> is full".to_owned(), exit_code: 75 });
    let last = view.since(&mut cursor);
    assert_eq!((last.head.state, last.head.exit_code), (State::Failed, Some(75)));
    assert_eq!(
        last.log.items.last().map(|line| (line.level, line.text.as_str())),
        Some((Level::Error, "<b>disk</b> is full"))
    );
}

#[test]
fn a_long_log_loses_its_beginning_and_says_so() {
    let mut tail = Tail::new(3);
    let mut cursor = 0;
    (0..2).for_each(|item| tail.push(item));
    assert_eq!(tail.since(&mut cursor), Part { from: 0, items: vec![0, 1] });
    (2..7).for_each(|item| tail.push(item));
    assert_eq!(tail.since(&mut cursor), Part { from: 4, items: vec![4, 5, 6] });
    assert_eq!(tail.since(&mut cursor), Part { from: 7, items: Vec::new() });
}
