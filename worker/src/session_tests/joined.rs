//! Devices that are joined with each other: whatever becomes of that, the bytes are the same.

use super::*;
use crate::transport::fake::{Hub, Mishap, Plan};

/// Prunes two layers with one assistant, the device of each joined by what `hub` plans: artifacts, assistants lost, links.
async fn joined(run: &TestRun, hub: &Arc<Hub>) -> (Vec<Artifact>, u32, Vec<LinkUse>) {
    let tasks = TaskGroup::new();
    let assistant = TestWorker::joinable(1 << 20, Some(hub.carrier(1))).attached_to(run);
    let (_assistant, endpoint) = listening(assistant, &tasks);
    let mut owner = TestWorker::joinable(u64::MAX, Some(hub.carrier(0))).attached_to(run);
    let shared = owner.with_links(run, &[endpoint]).await;
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
    shared
}

fn nccl() -> LinkUse {
    LinkUse { kind: LinkKind::Nccl, declined: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn joined_devices_change_no_byte() {
    for method in ["espalier", "sparsegpt"] {
        let run = in_small_blocks("llama-tiny", method);
        let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
        let hub = Hub::new(None);
        assert_eq!(joined(&run, &hub).await, (alone, 0, vec![nccl(), nccl()]), "{method}");
        assert!(hub.bytes() > 100_000, "{} bytes went from device to device", hub.bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_that_fails_in_the_middle_costs_an_assistant_and_no_byte() {
    let run = in_small_blocks("llama-tiny", "espalier");
    let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
    for mishap in [Mishap::Hangs, Mishap::Dies, Mishap::Damages] {
        // Hidden states come first, and then sums, statistics, weights and the output.
        for (rank, transfer) in [(0, 2), (0, 12), (1, 14), (0, 19)] {
            let hub = Hub::new(Some(Plan { mishap, rank, transfer }));
            let (artifacts, lost, links) = joined(&run, &hub).await;
            let fired = hub.fired();
            assert_eq!(artifacts, alone, "{mishap:?} of rank {rank} at {transfer}");
            assert_eq!((links, lost > 0), (vec![nccl(), nccl()], fired > 0), "{mishap:?} of rank {rank} at {transfer}");
            assert!(fired > 0 || mishap == Mishap::Damages, "only what is sent is damaged");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_that_does_not_come_about_is_told_and_does_without() {
    let run = in_small_blocks("llama-tiny", "espalier");
    let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
    for (mishap, rank) in [Mishap::Refuses, Mishap::Lingers, Mishap::Misplaces].iter().flat_map(|m| [(m, 0), (m, 1)]) {
        let hub = Hub::new(Some(Plan { mishap: *mishap, rank, transfer: 0 }));
        let (artifacts, lost, links) = joined(&run, &hub).await;
        assert_eq!((artifacts, lost, hub.fired()), (alone.clone(), 0, 1), "{mishap:?} of rank {rank}");
        for link in links {
            assert_eq!(link.kind, LinkKind::Grpc);
            assert!(link.declined.as_deref().is_some_and(|why| why.contains("nccl did not come about")), "{link:?}");
        }
        assert_eq!(hub.bytes(), 0, "{mishap:?} of rank {rank}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_two_builds_do_without_and_say_so() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let hub = Hub::new(None);
    let (_plain, plain) = served(&run, &tasks);
    let able = TestWorker::joinable(1 << 20, Some(hub.carrier(1))).attached_to(&run);
    let (_able, able) = listening(able, &tasks);
    let mut owner = TestWorker::joinable(u64::MAX, Some(hub.carrier(0))).attached_to(&run);
    let (with_both, lost, links) = owner.with_links(&run, &[plain.clone(), able]).await;
    let declined = LinkUse { kind: LinkKind::Grpc, declined: Some("the other worker has no nccl".to_owned()) };
    assert_eq!((lost, links), (0, vec![declined.clone(), nccl(), declined, nccl()]));
    // An owner that has nothing to offer has nothing to say about it.
    let mut owner = TestWorker::prepared(&run, u64::MAX);
    let (alone, _, links) = owner.with_links(&run, &[plain]).await;
    assert_eq!((alone, links), (with_both, vec![LinkUse { kind: LinkKind::Grpc, declined: None }; 2]));
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}
