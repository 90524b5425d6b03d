//! What every link must do: one body of tests, run for each kind.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use candle_core::{Device, Tensor};
use espalier_common::device::DeviceChoice;
use espalier_common::tasks::TaskGroup;
use futures::future::{BoxFuture, join_all};
use tokio::sync::mpsc::Receiver;

use super::collective::{CollectiveError, Place, all_reduce, broadcast};
use super::fake::{Hub, Mishap, Plan};
use super::link::{BodyError, Link, Patience};
use super::negotiation::Carrier;
use super::paired::{Paired, TURNS};
use super::ring::{RING_BYTES, SharedMemory};
use super::turns::Turn;
use super::{CHUNK_BYTES, WINDOW_BYTES, communicator::Seat, grpc, loopback};
use crate::calibrate::tree::{Forest, Gatherer, LEAVES, Sampling, sequences_of};
use crate::config::NcclReach;
use crate::device;
use crate::linalg::oracle;

/// Both ends of a new link.
type Ends = (Arc<dyn Link>, Arc<dyn Link>);
/// A kind of link.
type Kind = fn(TaskGroup) -> BoxFuture<'static, Ends>;

fn over_loopback(_: TaskGroup) -> BoxFuture<'static, Ends> {
    let (first, second) = loopback::pair();
    Box::pin(std::future::ready((Arc::new(first) as Arc<dyn Link>, Arc::new(second) as Arc<dyn Link>)))
}

fn over_grpc(tasks: TaskGroup) -> BoxFuture<'static, Ends> {
    Box::pin(async move {
        let (first, second) = grpc::tests::stream_pair([None, None], &tasks).await;
        (Arc::new(first) as Arc<dyn Link>, Arc::new(second) as Arc<dyn Link>)
    })
}

fn over_shared_memory(tasks: TaskGroup) -> BoxFuture<'static, Ends> {
    Box::pin(async move {
        let folder = tempfile::tempdir().unwrap();
        let (memory, name) = (SharedMemory::at(folder.path().to_owned(), String::new()), SharedMemory::new_name());
        let rings = [memory.create(&name), memory.open(&name)].map(|ring| Some(ring.unwrap()));
        let (first, second) = grpc::tests::stream_pair(rings, &tasks).await;
        (Arc::new(first) as Arc<dyn Link>, Arc::new(second) as Arc<dyn Link>)
    })
}

fn over_a_fake(tasks: TaskGroup) -> BoxFuture<'static, Ends> {
    Box::pin(async move {
        let (first, second) = paired(fakes(&Hub::new(None)), &tasks).await.unwrap();
        (first as Arc<dyn Link>, second as Arc<dyn Link>)
    })
}

fn over_nccl(tasks: TaskGroup) -> BoxFuture<'static, Ends> {
    Box::pin(async move {
        let (first, second) = paired(two_ranks_of_nccl().unwrap().0, &tasks).await.unwrap();
        (first as Arc<dyn Link>, second as Arc<dyn Link>)
    })
}

fn fakes(hub: &Arc<Hub>) -> [Arc<dyn Carrier>; 2] {
    [0, 1].map(|rank| hub.carrier(rank))
}

/// NCCL on a GPU of this machine, or why it cannot be had.
fn nccl_on(number: usize) -> Result<Arc<dyn Carrier>, String> {
    let chosen = device::open(DeviceChoice::Cuda(number), false).map_err(|error| error.to_string())?;
    let carrier = device::carrier(&chosen, NcclReach::Cluster).map_err(|error| error.to_string())?;
    carrier.ok_or_else(|| "it is off".to_owned())
}

/// Two GPUs, or one for both ranks; whether it is one.
fn two_ranks_of_nccl() -> Result<([Arc<dyn Carrier>; 2], bool), String> {
    let first = nccl_on(0)?;
    match nccl_on(1) {
        Ok(second) => Ok(([first, second], false)),
        Err(_) => Ok(([Arc::clone(&first), first], true)),
    }
}

/// One side of a pair, and what it has to say to the other.
async fn meet(
    carrier: &Arc<dyn Carrier>,
    id: &[u8],
    rank: u32,
    patience: Patience,
) -> Result<(Arc<Paired>, Receiver<Turn>), BodyError> {
    let (seat, kind) = (Seat::new(rank, id), carrier.facts().kind);
    let (said, turns) = tokio::sync::mpsc::channel(TURNS);
    let (carrier, id) = (Arc::clone(carrier), id.to_owned());
    let join = Box::new(move || carrier.join(&id, rank));
    Paired::meet(kind, join, seat, patience, said).await.map(|pair| (Arc::new(pair), turns))
}

/// A pair over a library, and a stream of turns each way.
async fn paired(
    carriers: [Arc<dyn Carrier>; 2],
    tasks: &TaskGroup,
) -> Result<(Arc<Paired>, Arc<Paired>), [Option<BodyError>; 2]> {
    let id = carriers[0].new_id().unwrap();
    let meet = |rank: u32| {
        let carrier = &carriers[rank as usize];
        meet(carrier, &id, rank, carrier.patience())
    };
    match tokio::join!(meet(0), meet(1)) {
        (Ok((first, from_first)), Ok((second, from_second))) => {
            for (mut turns, to) in [(from_first, Arc::downgrade(&second)), (from_second, Arc::downgrade(&first))] {
                let token = tasks.token();
                tasks.spawn(async move {
                    while let Some(Some(turn)) = token.run_until_cancelled(turns.recv()).await {
                        let Some(to) = to.upgrade() else { return };
                        let _ = to.hear(turn); // what it makes of it, its waiters hear
                    }
                    if let Some(to) = to.upgrade() {
                        to.hung_up();
                    }
                });
            }
            Ok((first, second))
        }
        (first, second) => Err([first.err(), second.err()]),
    }
}

fn body(bytes: usize, seed: u8) -> Bytes {
    (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed)).collect::<Vec<u8>>().into()
}

/// Nothing here takes long; what does is a hang.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("it hangs")
}

/// The suite.
async fn conforms(kind: Kind) {
    let tasks = TaskGroup::new();
    let new = || kind(tasks.clone());
    bodies_go_both_ways_at_once(new().await).await;
    another_size_than_must_come_is_an_error(new().await).await;
    an_abort_ends_every_wait(new().await).await;
    a_death_ends_every_wait(new().await).await;
    for workers in [2, 3, 5] {
        let links: Vec<Ends> = join_all((1..workers).map(|_| new())).await;
        sums_are_the_same_bits_whoever_has_what(&links).await;
        links_fail_one_by_one(links).await;
    }
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

async fn bodies_go_both_ways_at_once((first, second): Ends) {
    let sizes = [1, 0, CHUNK_BYTES - 1, CHUNK_BYTES + 1, 4, 3 * CHUNK_BYTES + 5, WINDOW_BYTES as usize + 7];
    let send = async |link: &dyn Link, seed: u8| {
        for (&bytes, seed) in sizes.iter().zip(seed..) {
            link.send(body(bytes, seed)).await.unwrap();
        }
    };
    let receive = async |link: &dyn Link, seed: u8| {
        for (&bytes, seed) in sizes.iter().zip(seed..) {
            assert!(link.receive(bytes).await.unwrap() == body(bytes, seed), "body of {bytes} bytes");
        }
    };
    soon(async { tokio::join!(send(&*first, 1), receive(&*first, 100), send(&*second, 100), receive(&*second, 1)) })
        .await;
}

async fn another_size_than_must_come_is_an_error((first, second): Ends) {
    let receive = async {
        let error = second.receive(7).await.unwrap_err();
        assert!(matches!(error, BodyError::Size { .. } | BodyError::Parcel(_)), "{error}");
        assert!(second.receive(1).await.is_err(), "an end that failed is at its end");
        drop(second);
    };
    // A sender need not have waited for its receiver's opinion; it must not wait for ever.
    let (_, ()) = soon(async { tokio::join!(first.send(body(9, 0)), receive) }).await;
}

async fn an_abort_ends_every_wait((first, second): Ends) {
    let (there, here) = (Arc::clone(&second), Arc::clone(&first));
    let far = async move { there.receive(5).await };
    let near = async {
        let (waiting, ()) = tokio::join!(here.receive(5), async { here.abort("enough") });
        assert_eq!(waiting, Err(BodyError::Aborted { reason: "enough".to_owned() }));
        assert!(here.send(body(3, 0)).await.is_err());
        drop((here, first));
    };
    drop(second);
    let (far, ()) = soon(async { tokio::join!(far, near) }).await;
    assert!(far.is_err());
}

async fn a_death_ends_every_wait((first, second): Ends) {
    drop(first);
    let send_on = async {
        // The first bodies may find room; sooner or later one does not.
        for seed in 0..64 {
            second.send(body(CHUNK_BYTES, seed)).await?;
        }
        Ok::<_, BodyError>(())
    };
    let (received, sent) = soon(async { tokio::join!(second.receive(5), send_on) }).await;
    assert!(received.is_err() && sent.is_err(), "{received:?} {sent:?}");
}

const SAMPLING: Sampling = Sampling { columns: 7, with_dense: false, sequences: 19, calibrating: 16, tokens: 3 };

fn shares(workers: usize) -> Vec<Range<usize>> {
    (0..workers).map(|worker| worker * LEAVES / workers..(worker + 1) * LEAVES / workers).collect()
}

fn gathered(leaves: Range<usize>) -> Forest {
    let mut gatherer = Gatherer::new(SAMPLING, leaves.clone());
    for sequence in sequences_of(&leaves, SAMPLING.sequences) {
        let values = oracle::random(sequence as u64, SAMPLING.tokens * SAMPLING.columns);
        let inputs = Tensor::from_vec(values, (SAMPLING.tokens, SAMPLING.columns), &Device::Cpu).unwrap();
        gatherer.add(&[inputs], None).unwrap();
    }
    gatherer.finish().unwrap().0
}

/// The middle's ends of some links, and what is to be done by everybody else.
fn star(links: &[Ends]) -> (Vec<&dyn Link>, Vec<Place<'_>>) {
    let middle = links.iter().map(|(middle, _)| &**middle).collect();
    (middle, links.iter().enumerate().map(|(number, (_, outside))| Place::Outside(number, &**outside)).collect())
}

async fn sums_are_the_same_bits_whoever_has_what(links: &[Ends]) {
    let alone = gathered(0..LEAVES).into_sum().unwrap().into_values().unwrap();
    let shares = shares(links.len() + 1);
    let (middle, outside) = star(links);
    let everybody = std::iter::once(Place::Middle(&middle)).chain(outside).zip(&shares);
    let reduce = everybody.map(|(place, leaves)| {
        let (own, shares) = (gathered(leaves.clone()), &shares);
        async move { all_reduce(place, &SAMPLING, shares, own).await.unwrap().into_values().unwrap() }
    });
    for sums in soon(join_all(reduce)).await {
        assert!(sums.iter().map(|value| value.to_bits()).eq(alone.iter().map(|value| value.to_bits())));
    }
}

async fn links_fail_one_by_one(mut links: Vec<Ends>) {
    let last = links.len() - 1;
    // Somebody dies; the middle is told which, and all others still have links that work.
    let (middle, outside) = links.pop().unwrap();
    drop(outside);
    let ends: Vec<&dyn Link> = links.iter().map(|(middle, _)| &**middle).chain([&*middle]).collect();
    let receive = links.iter().map(|(_, outside)| outside.receive(6));
    let big = async {
        loop {
            // A body that finds room before the death is heard of.
            if let Err(error) = broadcast(Place::Middle(&ends[last..]), body(CHUNK_BYTES, 0), CHUNK_BYTES).await {
                return error;
            }
        }
    };
    let CollectiveError::Link { link: 0, .. } = soon(big).await else { panic!("another link failed") };
    let (sent, received) =
        soon(async { tokio::join!(broadcast(Place::Middle(&ends[..last]), body(6, 9), 6), join_all(receive)) }).await;
    assert_eq!(sent.unwrap(), body(6, 9));
    assert!(received.into_iter().all(|received| received.unwrap() == body(6, 9)));
}

#[tokio::test(flavor = "multi_thread")]
async fn loopback_conforms() {
    conforms(over_loopback).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn grpc_conforms() {
    conforms(over_grpc).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_conforms() {
    conforms(over_shared_memory).await;
}

/// What is not read yet would be overwritten otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_written_to_a_ring_that_is_full() {
    let tasks = TaskGroup::new();
    let (first, second) = over_shared_memory(tasks.clone()).await;
    // No two pieces are alike.
    let sent: Bytes = (0..2 * RING_BYTES as usize).map(|at| (at * 7 + at / 251) as u8).collect::<Vec<_>>().into();
    let mut sending = Box::pin(first.send(sent.clone()));
    // All that the stream and its queues take is announced by then.
    assert!(tokio::time::timeout(Duration::from_millis(300), &mut sending).await.is_err(), "nobody has read");
    let (received, ()) =
        soon(async { tokio::join!(second.receive(sent.len()), async { sending.await.unwrap() }) }).await;
    assert!(received.unwrap() == sent);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pair_of_communicators_conforms() {
    conforms(over_a_fake).await;
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr, reason = "what a test leaves out is said out loud")]
async fn nccl_conforms() {
    let (carriers, is_one_gpu) = match two_ranks_of_nccl() {
        Ok(ranks) => ranks,
        Err(reason) => return eprintln!("SKIPPED: NCCL between two ranks: {reason}"),
    };
    if is_one_gpu && let Err(refusal) = soon(paired(carriers, &TaskGroup::new())).await {
        // From 2.30 on one GPU may be had twice, if `NCCL_MULTI_RANK_GPU_ENABLE` is 1.
        let refusal = format!("{refusal:?}");
        assert!(refusal.contains("InvalidUsage"), "{refusal}");
        return eprintln!("SKIPPED: NCCL between two ranks: it may not have one GPU twice: {refusal}");
    }
    conforms(over_nccl).await;
}

#[tokio::test(flavor = "multi_thread")]
#[allow(clippy::print_stderr, reason = "what a test leaves out is said out loud")]
async fn nccl_gives_up_whoever_does_not_come() {
    let carrier = match nccl_on(0) {
        Ok(carrier) => carrier,
        Err(reason) => return eprintln!("SKIPPED: NCCL: {reason}"),
    };
    let patience = Patience { least: Duration::from_secs(2), bytes_per_second: 1e9 };
    for rank in [0, 1] {
        let met = soon(meet(&carrier, &carrier.new_id().unwrap(), rank, patience)).await;
        let error = met.map(drop).expect_err("it met nobody");
        assert!(matches!(error, BodyError::Overdue { what: "joining", .. }), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_when_two_meet_is_told_to_both_in_time() {
    for mishap in [Mishap::Refuses, Mishap::Lingers, Mishap::Misplaces, Mishap::Hangs, Mishap::Dies, Mishap::Damages] {
        for rank in [0, 1] {
            for transfer in [0, 1] {
                let is_joining = matches!(mishap, Mishap::Refuses | Mishap::Lingers | Mishap::Misplaces);
                // Rank 0 says hello first, rank 1 hears it first.
                let is_sent = (rank == 0) == (transfer == 0);
                if (is_joining && transfer > 0) || (mishap == Mishap::Damages && !is_sent) {
                    continue;
                }
                let (hub, tasks) = (Hub::new(Some(Plan { mishap, rank, transfer })), TaskGroup::new());
                let met = soon(paired(fakes(&hub), &tasks)).await;
                let errors = met.map(drop).expect_err("they met");
                assert_eq!(hub.fired(), 1, "{mishap:?} {rank} {transfer}");
                let own = errors[rank as usize].as_ref();
                match mishap {
                    Mishap::Lingers | Mishap::Hangs => {
                        assert!(matches!(own, Some(BodyError::Overdue { .. })), "{own:?}")
                    }
                    Mishap::Misplaces => assert!(matches!(own, Some(BodyError::Stranger { .. })), "{own:?}"),
                    Mishap::Damages => {
                        let other = &errors[1 - rank as usize];
                        assert!(matches!(other, Some(BodyError::Stranger { .. })), "{other:?}");
                    }
                    Mishap::Refuses | Mishap::Dies => {
                        assert!(matches!(own, Some(BodyError::Library { .. })), "{own:?}")
                    }
                }
                assert!(tasks.shut_down(Duration::from_secs(5)).await);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_wrong_with_a_body_is_told_to_both_in_time() {
    for mishap in [Mishap::Hangs, Mishap::Dies, Mishap::Damages] {
        for (rank, transfer) in [(0, 2), (0, 4), (1, 2), (1, 3)] {
            let (hub, tasks) = (Hub::new(Some(Plan { mishap, rank, transfer })), TaskGroup::new());
            let (first, second) = soon(paired(fakes(&hub), &tasks)).await.unwrap();
            // Bodies go down until something happens.
            let down = async {
                let error = loop {
                    if let Err(error) = first.send(body(50, 3)).await {
                        break error;
                    }
                };
                drop(first);
                error
            };
            let up = async {
                let error = loop {
                    if let Err(error) = second.receive(50).await {
                        break error;
                    }
                };
                drop(second);
                error
            };
            if mishap == Mishap::Damages && rank == 1 {
                continue; // it sends nothing
            }
            let errors = soon(async { tokio::join!(down, up) }).await;
            assert_eq!(hub.fired(), 1);
            // No side is left behind with a transfer under way.
            soon(async {
                while hub.ended() != (2, 0) {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            match mishap {
                Mishap::Damages => assert_eq!(errors.1, BodyError::Checksum { bytes: 50 }),
                // Whoever is first to be out of patience hangs up on the other.
                Mishap::Hangs => assert!(
                    [&errors.0, &errors.1].iter().any(|error| matches!(error, BodyError::Overdue { .. })),
                    "{errors:?}"
                ),
                _ => assert!(matches!(errors.0, BodyError::Library { .. } | BodyError::HungUp), "{errors:?}"),
            }
            assert!(tasks.shut_down(Duration::from_secs(5)).await);
        }
    }
}
