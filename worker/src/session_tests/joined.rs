//! Workers that are joined by more than a stream: whatever becomes of that, the bytes are the same.

use std::path::Path;

use super::*;
use crate::transport::SharedMemory;
use crate::transport::fake::{Hub, Mishap, Plan};

/// Prunes two layers with one assistant, the device of each joined by what `hub` plans: layers, assistants lost, links.
async fn joined(run: &TestRun, hub: &Arc<Hub>) -> (Vec<Layer>, u32, Vec<LinkUse>) {
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
            let (layers, lost, links) = joined(&run, &hub).await;
            let fired = hub.fired();
            assert_eq!(layers, alone, "{mishap:?} of rank {rank} at {transfer}");
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
        let (layers, lost, links) = joined(&run, &hub).await;
        assert_eq!((layers, lost, hub.fired()), (alone.clone(), 0, 1), "{mishap:?} of rank {rank}");
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

/// A worker that can share memory in a folder with others that say they are on this machine.
fn sharing(folder: &Path, machine: &str, run: &TestRun) -> TestWorker {
    let memory = SharedMemory::at(folder.to_owned(), machine.to_owned());
    TestWorker::joined_by(u64::MAX, Joining::by(None, Some(memory))).attached_to(run)
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_of_one_machine_share_memory_and_leave_nothing_there() {
    for method in ["espalier", "sparsegpt"] {
        let (run, tasks) = (in_small_blocks("llama-tiny", method), TaskGroup::new());
        let folder = tempfile::tempdir().unwrap();
        let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
        let (_assistant, endpoint) = listening(sharing(folder.path(), "a", &run), &tasks);
        let shared = sharing(folder.path(), "a", &run).with_links(&run, &[endpoint]).await;
        let shm = LinkUse { kind: LinkKind::Shm, declined: None };
        assert_eq!(shared, (alone, 0, vec![shm.clone(), shm]), "{method}");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_cannot_share_memory_do_without_and_say_why() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let [here, there] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
    let (_plain, plain) = served(&run, &tasks);
    let (_far, far) = listening(sharing(here.path(), "b", &run), &tasks);
    // Containers of one machine may have a folder each, and a folder may be no place to write.
    let (_apart, apart) = listening(sharing(there.path(), "a", &run), &tasks);
    let (_barred, barred) = listening(sharing(&here.path().join("nowhere"), "a", &run), &tasks);
    let endpoints = [plain, far, apart, barred];
    // Workers of two machines are as they always were.
    let reasons = ["has no shm", "", "cannot open a ring", "cannot make a ring"];
    let (artifacts, lost, links) = sharing(here.path(), "a", &run).with_links(&run, &endpoints).await;
    assert_eq!((artifacts, lost, links.len()), (alone, 0, 2 * reasons.len()));
    for (link, reason) in links.iter().zip(reasons.iter().cycle()) {
        assert_eq!(link.kind, LinkKind::Grpc);
        assert_eq!(link.declined.is_some(), !reason.is_empty(), "{link:?}");
        assert!(link.declined.as_deref().unwrap_or_default().contains(reason), "{link:?}");
    }
    assert_eq!(std::fs::read_dir(&there).unwrap().count(), 0, "a ring that nobody opened");
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}
