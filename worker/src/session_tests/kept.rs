//! The strategy `data`: every worker keeps its share of the hidden states, whoever comes, goes, or was wrong about a layer.

use std::ops::Range;

use espalier_common::wire::Shares;

use super::*;
use crate::calibrate::tree::LEAVES;

/// How one layer is shared.
struct Share<'a> {
    assistants: &'a [String],
    leaves: Vec<Range<usize>>,
    pattern: Pattern,
    keeps_output: bool,
}

impl<'a> Share<'a> {
    /// Even shares, the owner's the first.
    fn even(assistants: &'a [String]) -> Self {
        let hands = 1 + assistants.len();
        let leaves = (1..hands).map(|hand| hand * LEAVES / hands..(hand + 1) * LEAVES / hands).collect();
        Self { assistants, leaves, pattern: HALF, keeps_output: false }
    }
}

impl TestWorker {
    /// Prunes the layer behind those that are committed; returns what it becomes, its stored output, and how many were given up on.
    async fn together(
        &mut self,
        run: &TestRun,
        committed: &[Artifact],
        share: Share<'_>,
    ) -> (Artifact, Option<Artifact>, u32) {
        let layer = LayerIndex(committed.len() as u32);
        let shares = Some(Shares { leaves: share.leaves, predecessor: committed.last().cloned() });
        let work = Work::Prune {
            layer,
            source: embedded(committed),
            pattern: share.pattern,
            keeps_output: share.keeps_output,
            assistants: share.assistants.to_vec(),
            gflops: Vec::new(),
            shares,
        };
        match self.outcome(run, Unit::Prune(layer), work).await {
            Outcome::Pruned { artifact, boundary, assistants_lost, .. } => (artifact, boundary, assistants_lost),
            other => panic!("{other:?}"),
        }
    }

    /// All layers, shared evenly.
    async fn all_together(&mut self, run: &TestRun, assistants: &[String]) -> (Vec<Artifact>, u32) {
        let (mut artifacts, mut lost) = (Vec::new(), 0);
        for _ in 0..LAYERS {
            let (artifact, _, given_up) = self.together(run, &artifacts, Share::even(assistants)).await;
            artifacts.push(artifact);
            lost += given_up;
        }
        (artifacts, lost)
    }
}

/// Even shares of a layer whose output is stored too.
fn stored(assistants: &[String]) -> Share<'_> {
    Share { keeps_output: true, ..Share::even(assistants) }
}

/// Some workers that others can call, and where.
fn some(run: &TestRun, count: usize, tasks: &TaskGroup) -> (Vec<TestWorker>, Vec<String>) {
    (0..count).map(|_| served(run, tasks)).unzip()
}

#[tokio::test(flavor = "multi_thread")]
async fn shares_that_are_kept_change_no_byte_whatever_the_method() {
    let methods = ["espalier", "sparsegpt", "alps", "fista", "wanda", "magnitude"];
    for (method, name) in methods.into_iter().zip(["llama-tiny", "opt-tiny", "qwen2-tiny"].into_iter().cycle()) {
        let (run, tasks) = (in_small_blocks(name, method), TaskGroup::new());
        let alone = TestWorker::prepared(&run, u64::MAX).chain(&run).await;
        let (helpers, endpoints) = some(&run, 3, &tasks);
        for count in 0..=3 {
            let mut owner = TestWorker::prepared(&run, 1 << 20);
            let together = owner.all_together(&run, &endpoints[..count]).await;
            assert_eq!(together, (alone.clone(), 0), "{name}, {method}, {count}");
            for helper in &helpers[..count] {
                let kept = helper.session.cached_bytes();
                assert!(kept.0 + kept.1 > 0, "{method}: an assistant kept nothing");
                helper.session.release(&run.id, &[]);
                helper.session.prepare(run.id.clone(), run.job.clone(), &run.url(), &run.tokens).unwrap();
            }
        }
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_hidden_states_travel_and_everybody_reads_ahead() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "wanda"), TaskGroup::new());
    let (helpers, endpoints) = some(&run, 2, &tasks);
    let mut lender = TestWorker::prepared(&run, u64::MAX);
    [&lender, &helpers[0], &helpers[1]].iter().for_each(|worker| worker.session.read_ahead());
    lender.with_assistants(&run, &endpoints).await;
    assert_eq!([ahead(&lender), ahead(&helpers[0]), ahead(&helpers[1])], [Some(LayerIndex(2)); 3]);
    let mut keeper = TestWorker::prepared(&run, u64::MAX);
    keeper.session.read_ahead();
    // As they are lent.
    let share = || Share { leaves: vec![0..3, 3..6], ..Share::even(&endpoints) };
    let (first, ..) = keeper.together(&run, &[], share()).await;
    assert_eq!([ahead(&keeper), ahead(&helpers[0]), ahead(&helpers[1])], [Some(LayerIndex(1)); 3]);
    keeper.together(&run, &[first], share()).await;
    // Two of three shares of two layers' outputs: five sequences of 24 tokens, as floats.
    let (lent, kept) = (lender.session.bytes_received(), keeper.session.bytes_received());
    assert!(kept < lent, "{kept} against {lent}");
    drop(helpers);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_share_that_moves_or_was_not_kept_is_made_again() {
    let (run, tasks) = (in_small_blocks("opt-tiny", "sparsegpt"), TaskGroup::new());
    let alone = TestWorker::prepared(&run, u64::MAX).chain(&run).await;
    let (_helpers, endpoints) = some(&run, 3, &tasks);
    let swapped = [endpoints[1].clone(), endpoints[0].clone()];
    let mut owner = TestWorker::prepared(&run, u64::MAX);
    let empty = Share { leaves: vec![3..8, 8..8], ..Share::even(&endpoints[..2]) };
    let all_of_it = Share { leaves: vec![0..3, 3..8], ..Share::even(&swapped) };
    let mut artifacts = Vec::new();
    // One has no share, then the owner has none; then another takes over, and one comes that has seen nothing.
    for share in [empty, all_of_it, Share::even(&endpoints[1..])] {
        let (artifact, _, lost) = owner.together(&run, &artifacts, share).await;
        assert_eq!((&artifact, lost), (&alone[artifacts.len()], 0));
        artifacts.push(artifact);
    }
    let mut late = TestWorker::prepared(&run, u64::MAX);
    let (last, ..) = late.together(&run, &artifacts, Share::even(&endpoints)).await;
    assert_eq!(last, alone[3]);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_of_an_attempt_that_came_to_nothing_is_not_used() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "sparsegpt"), TaskGroup::new());
    let alone = TestWorker::prepared(&run, u64::MAX).chain(&run).await;
    let (_helpers, endpoints) = some(&run, 1, &tasks);
    let mut owner = TestWorker::prepared(&run, u64::MAX);
    let other = Share { pattern: Pattern::Unstructured { sparsity: 0.25 }, ..Share::even(&endpoints) };
    let (wrong, ..) = owner.together(&run, &[], other).await;
    assert_ne!(wrong, alone[0]);
    let mut second = TestWorker::prepared(&run, u64::MAX);
    let (first, ..) = second.together(&run, &[], Share::even(&[])).await;
    assert_eq!(first, alone[0]);
    // The assistant still has what the other attempt gave.
    let (next, ..) = second.together(&run, &alone[..1], Share::even(&endpoints)).await;
    assert_eq!(next, alone[1]);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assistant_with_a_share_costs_nothing_whenever_it_goes_and_its_output_is_stored_all_the_same() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let mut alone = TestWorker::prepared(&run, u64::MAX);
    let (first, first_output, _) = alone.together(&run, &[], stored(&[])).await;
    let (second, second_output, _) = alone.together(&run, std::slice::from_ref(&first), stored(&[])).await;
    assert!(first_output.is_some() && second_output.is_some());
    let (_helper, endpoint) = served(&run, &tasks);
    let mut lost = Vec::new();
    for after in [0, 5_000, 30_000, 100_000, 200_000, 1 << 30] {
        let endpoint = [cut_off(&tasks, &endpoint, after).await];
        let mut owner = TestWorker::prepared(&run, u64::MAX);
        let (artifact, output, one) = owner.together(&run, &[], stored(&endpoint)).await;
        assert_eq!((&artifact, &output), (&first, &first_output), "cut off after {after} bytes");
        let (artifact, output, two) = owner.together(&run, std::slice::from_ref(&first), stored(&endpoint)).await;
        assert_eq!((&artifact, &output), (&second, &second_output), "cut off after {after} bytes");
        lost.push(one + two);
    }
    assert_eq!((lost[0], *lost.last().unwrap()), (2, 0), "{lost:?}");
    assert!(lost.iter().filter(|&&lost| lost > 0).count() > 2, "{lost:?}");
    // From the store, and from nobody's memory.
    let from = SourceFrom::Stored { boundary: Boundary(2), artifact: second_output.unwrap() };
    let work = Work::Prune {
        layer: LayerIndex(2),
        source: Source { from, replay: Vec::new() },
        pattern: HALF,
        keeps_output: false,
        assistants: vec![endpoint],
        gflops: Vec::new(),
        shares: Some(Shares { leaves: std::iter::once(5..8).collect(), predecessor: Some(second.clone()) }),
    };
    let mut late = TestWorker::prepared(&run, u64::MAX);
    let outcome = late.outcome(&run, Unit::Prune(LayerIndex(2)), work).await;
    let Outcome::Pruned { artifact, assistants_lost: 0, .. } = outcome else { panic!("{outcome:?}") };
    assert_eq!(artifact, alone.together(&run, &[first, second], Share::even(&[])).await.0);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

impl TestWorker {
    /// Prunes a layer whose input is lent, or made by everyone where there are layers to run through; returns what it becomes, and how
    /// many were given up on.
    async fn lending(&mut self, run: &TestRun, layer: u32, source: Source, endpoint: &str) -> (Artifact, u32) {
        let (layer, assistants) = (LayerIndex(layer), vec![endpoint.to_owned()]);
        let (pattern, gflops, shares) = (HALF, Vec::new(), None);
        let work = Work::Prune { layer, source, pattern, keeps_output: false, assistants, gflops, shares };
        match self.outcome(run, Unit::Prune(layer), work).await {
            Outcome::Pruned { artifact, assistants_lost, .. } => (artifact, assistants_lost),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_lie_between_are_run_through_by_everyone_and_their_output_is_given_back() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let mut lender = TestWorker::prepared(&run, u64::MAX);
    let alone = lender.chain(&run).await;
    let (helpers, endpoints) = some(&run, 2, &tasks);
    let mut owner = TestWorker::prepared(&run, u64::MAX);
    assert_eq!(owner.lending(&run, 2, embedded(&alone[..2]), &endpoints[0]).await, (alone[2].clone(), 0));
    let states = helpers[0].session.cached_bytes();
    let given_back = tokio::time::timeout(Duration::from_secs(5), async {
        while helpers[0].session.cached_bytes() != (0, 0) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    given_back.await.unwrap_or_else(|_| panic!("{states:?} bytes are kept"));
    assert_eq!(owner.lending(&run, 3, held(3), &endpoints[1]).await, (alone[3].clone(), 0));
    // What lies behind all of them is the layer's input alone, which is lent to the other.
    let mut second = TestWorker::prepared(&run, u64::MAX);
    second.prune(&run, 0, embedded(&[])).await;
    second.prune(&run, 1, held(1)).await;
    let before = helpers[1].session.bytes_received();
    assert_eq!(second.lending(&run, 2, held(2), &endpoints[1]).await.0, alone[2]);
    let (lent, made) = (helpers[1].session.bytes_received() - before, helpers[0].session.bytes_received());
    assert!(made < lent, "{made} against {lent}");
    // The owner makes what an assistant that goes does not, before the layer and behind it.
    for after in [0, 5_000, 200_000, 400_000] {
        let endpoint = cut_off(&tasks, &endpoints[0], after).await;
        let mut owner = TestWorker::prepared(&run, u64::MAX);
        assert_eq!(owner.lending(&run, 2, embedded(&alone[..2]), &endpoint).await.0, alone[2], "{after}");
        assert_eq!(owner.lending(&run, 3, held(3), &endpoint).await.0, alone[3], "{after}");
    }
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_shared_is_refused() {
    let run = TestRun::with("llama-tiny", "wanda", "pruned", true);
    let mut worker = TestWorker::prepared(&run, u64::MAX);
    let lease = worker.lease(Unit::Prune(LayerIndex(0)));
    let shares = Some(Shares { leaves: Vec::new(), predecessor: None });
    let work = Work::Prune {
        layer: LayerIndex(0),
        source: embedded(&[]),
        pattern: HALF,
        keeps_output: false,
        assistants: Vec::new(),
        gflops: Vec::new(),
        shares,
    };
    worker.session.start(&run.id, lease, work).unwrap();
    let fault = worker.report().await.result.unwrap_err();
    assert_eq!((fault.class, fault.message.as_str()), (FaultClass::Bug, "layers of this job are not shared"));
}
