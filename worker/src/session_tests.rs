//! Sessions end to end, in one process: real model, real store, real transfers between workers.

mod joined;
mod kept;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use espalier_common::calibration::TokenBlock;
use espalier_common::fault::FaultClass;
use espalier_common::ids::{Attempt, Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::pattern::Pattern;
use espalier_common::report::{Artifact, LinkKind, LinkUse, Outcome, SublayerReport};
use espalier_common::store::{BlobStore, LocalStore};
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::{Source, SourceFrom};
use espalier_gate::Tracer;
use serde_json::json;
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::calibrate::cache::ActivationCache;
use crate::device::DeviceThread;
use crate::evaluation::Evaluation;
use crate::server::Listener;
use crate::session::{Peers, Session, SessionError, UnitReport, Work};
use crate::transport::{Carrier, Joining};

const HALF: Pattern = Pattern::Unstructured { sparsity: 0.5 };
const LAYERS: u32 = 4;

fn prune(layer: LayerIndex, source: Source) -> Work {
    let (assistants, gflops, shares) = (Vec::new(), Vec::new(), None);
    Work::Prune { layer, source, pattern: HALF, keeps_output: false, assistants, gflops, shares }
}

fn model(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/tiny").join(name)
}

/// A run on disk: a store with a token block, and the job.
struct TestRun {
    folder: TempDir,
    id: RunId,
    job: String,
    model: String,
    tokens: Artifact,
}

impl TestRun {
    fn new(name: &str, method: &str, mode: &str) -> Self {
        Self::with(name, method, mode, false)
    }

    fn with(name: &str, method: &str, mode: &str, reconstruct: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (samples, length) = (5, 24);
        let block = TokenBlock::new(length, (0..samples * length).map(|at| (at * at + 7 * at) as u32 % 500).collect());
        let tokens = Artifact {
            name: "tokens/calibration".to_owned(),
            sha256: block.digest(),
            bytes: block.to_bytes().len() as u64,
        };
        LocalStore::open(folder.path()).unwrap().put(&tokens.name, &block.to_bytes()).unwrap();
        let model = model(name).display().to_string();
        let job = json!({
            "model": { "source": model },
            "calibration": { "source": "c", "samples": samples, "sequence_length": length, "held_out": 0.2 },
            "method": if reconstruct {
                json!({ "name": method, "reconstruct": "submodule", "reconstruct_epochs": 4, "reconstruct_batch": 2 })
            } else {
                json!({ "name": method })
            },
            "propagation": { "mode": mode },
            "output": { "uri": "o" },
        });
        Self { folder, id: RunId("r".to_owned()), job: job.to_string(), model, tokens }
    }

    fn url(&self) -> String {
        self.folder.path().display().to_string()
    }
}

/// One worker of the test.
struct TestWorker {
    session: Arc<Session>,
    reports: mpsc::Receiver<UnitReport>,
    attempt: u32,
}

impl TestWorker {
    fn idle(budget_bytes: u64) -> Self {
        Self::joinable(budget_bytes, None)
    }

    fn joinable(budget_bytes: u64, carrier: Option<Arc<dyn Carrier>>) -> Self {
        Self::joined_by(budget_bytes, Joining::by(carrier, None))
    }

    fn joined_by(budget_bytes: u64, joining: Option<Arc<Joining>>) -> Self {
        let (sender, reports) = mpsc::channel(16);
        let cache = ActivationCache::new(budget_bytes, std::env::temp_dir());
        let device = DeviceThread::start(candle_core::Device::Cpu).unwrap();
        let session = Session::with_peers(
            device,
            cache,
            sender,
            Handle::current(),
            (Peers { joining, ..Peers::default() }, Tracer::default()),
        );
        Self { session, reports, attempt: 0 }
    }

    fn prepared(run: &TestRun, budget_bytes: u64) -> Self {
        Self::idle(budget_bytes).attached_to(run)
    }

    fn attached_to(self, run: &TestRun) -> Self {
        let worker = self;
        worker.session.prepare(run.id.clone(), run.job.clone(), &run.url(), &run.tokens).unwrap();
        worker
    }

    fn lease(&mut self, unit: Unit) -> Lease {
        self.attempt += 1;
        Lease { unit, worker: WorkerId(1), attempt: Attempt(self.attempt) }
    }

    async fn report(&mut self) -> UnitReport {
        tokio::time::timeout(Duration::from_secs(60), self.reports.recv()).await.unwrap().unwrap()
    }

    async fn outcome(&mut self, run: &TestRun, unit: Unit, work: Work) -> Outcome {
        let lease = self.lease(unit);
        self.session.start(&run.id, lease, work).unwrap();
        let report = self.report().await;
        assert_eq!(report.lease, lease);
        report.result.unwrap()
    }

    async fn prune(&mut self, run: &TestRun, layer: u32, source: Source) -> (Artifact, Vec<SublayerReport>) {
        let layer = LayerIndex(layer);
        match self.outcome(run, Unit::Prune(layer), prune(layer, source)).await {
            Outcome::Pruned { artifact, sublayers, .. } => (artifact, sublayers),
            other => panic!("{other:?}"),
        }
    }

    /// Prunes all layers as one chain.
    async fn chain(&mut self, run: &TestRun) -> Vec<Artifact> {
        let mut artifacts = Vec::new();
        for layer in 0..LAYERS {
            let source = if layer == 0 { embedded(&[]) } else { held(layer) };
            artifacts.push(self.prune(run, layer, source).await.0);
        }
        artifacts
    }
}

fn embedded(replay: &[Artifact]) -> Source {
    Source { from: SourceFrom::Tokens, replay: replay.to_vec() }
}

fn held(boundary: u32) -> Source {
    Source { from: SourceFrom::Held(Boundary(boundary)), replay: vec![] }
}

/// The layer that a worker has read ahead.
fn ahead(worker: &TestWorker) -> Option<LayerIndex> {
    worker.session.attached().unwrap().ahead.begun()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_layer_of_a_chain_is_read_ahead_and_no_other() {
    for reconstructs in [false, true] {
        let run = TestRun::with("llama-tiny", "wanda", "pruned", reconstructs);
        let mut worker = TestWorker::prepared(&run, u64::MAX);
        worker.session.read_ahead();
        for layer in 0..LAYERS {
            worker.prune(&run, layer, if layer == 0 { embedded(&[]) } else { held(layer) }).await;
            assert_eq!(ahead(&worker), (layer + 1 < LAYERS).then_some(LayerIndex(layer + 1)), "{reconstructs} {layer}");
        }
    }
    // What nobody took is let go of before a model is evaluated.
    let run = TestRun::new("llama-tiny", "wanda", "pruned");
    let mut worker = TestWorker::prepared(&run, u64::MAX);
    worker.session.read_ahead();
    worker.prune(&run, 0, embedded(&[])).await;
    assert_eq!(ahead(&worker), Some(LayerIndex(1)));
    let (model, tokens) = (run.model.clone(), run.tokens.clone());
    let evaluation = Evaluation { model, tokens, run_url: run.url(), windows: vec![0] };
    worker.outcome(&run, Unit::Evaluate(0), Work::Evaluate(evaluation)).await;
    assert_eq!(ahead(&worker), None);
    let run = TestRun::new("llama-tiny", "wanda", "dense");
    let mut worker = TestWorker::prepared(&run, u64::MAX);
    worker.session.read_ahead();
    worker.prune(&run, 0, embedded(&[])).await;
    assert_eq!(ahead(&worker), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_gives_the_same_bytes_from_peers_from_replays_and_from_disk() {
    for name in ["llama-tiny", "opt-tiny", "qwen2-tiny"] {
        let run = TestRun::new(name, "sparsegpt", "pruned");
        let mut first = TestWorker::prepared(&run, u64::MAX);
        let artifacts = first.chain(&run).await;
        assert_eq!(TestWorker::prepared(&run, 0).chain(&run).await, artifacts, "{name}: spilled");

        let (mut upper, tasks) = (TestWorker::prepared(&run, u64::MAX), TaskGroup::new());
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let endpoint = listener.endpoint();
        let mut lower = TestWorker::prepared(&run, 1 << 20);
        let (session, group) = (Arc::clone(&lower.session), tasks.clone());
        tasks.spawn(async move { listener.serve(session, group.clone(), group.token()).await.unwrap() });
        lower.prune(&run, 0, embedded(&[])).await;
        lower.prune(&run, 1, held(1)).await;
        let from = SourceFrom::Peer { endpoint, boundary: Boundary(2) };
        let (artifact, sublayers) = upper.prune(&run, 2, Source { from, replay: vec![] }).await;
        assert_eq!(artifact, artifacts[2], "{name}: fetched");
        assert!(upper.session.bytes_received() > 0);
        for report in sublayers {
            assert_eq!(report.zeros * 2, report.elements);
            assert!(report.rel_error > 0.0 && report.rel_error < 0.5, "{report:?}");
            assert!(report.held_out_error.is_some_and(|error| error > 0.0 && error < 1.0), "{report:?}");
        }
        assert!(tasks.shut_down(Duration::from_secs(5)).await);

        let mut late = TestWorker::prepared(&run, u64::MAX);
        assert_eq!(late.prune(&run, 3, embedded(&artifacts[..3])).await.0, artifacts[3], "{name}: replayed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reconstruction_brings_halves_nearer_to_the_dense_model_and_keeps_every_zero() {
    for (name, mode) in [("llama-tiny", "pruned"), ("opt-tiny", "dense")] {
        let run = TestRun::with(name, "wanda", mode, true);
        let chain = mode == "pruned";
        let mut worker = TestWorker::prepared(&run, u64::MAX);
        let (first, reports) = worker.prune(&run, 0, embedded(&[])).await;
        for report in &reports {
            assert_eq!(report.zeros * 2, report.elements);
            let tuned = report.reconstruction.unwrap();
            assert!(tuned.error_after < tuned.error_before && tuned.epochs > 0, "{report:?}");
        }
        let source = if chain { held(1) } else { embedded(&[]) };
        let (second, _) = worker.prune(&run, 1, source).await;
        // The same from disk, with the layer in between run again.
        let mut late = TestWorker::prepared(&run, 0);
        let replay = if chain { vec![first] } else { vec![] };
        assert_eq!(late.prune(&run, 1, embedded(&replay)).await.0, second, "{name}");
    }
}

/// A run whose job surveys the dense model.
fn surveyed(name: &str, allocation: &str) -> TestRun {
    let run = TestRun::new(name, "sparsegpt", "pruned");
    let pattern = format!("\"pattern\":{{\"sparsity\":0.5,\"allocation\":\"{allocation}\"}},\"output\"");
    TestRun { job: run.job.replace("\"output\"", &pattern), ..run }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_survey_looks_at_dense_layers_wherever_their_inputs_come_from() {
    for (name, allocation) in [("llama-tiny", "measured"), ("opt-tiny", "measured"), ("qwen2-tiny", "owl")] {
        let run = surveyed(name, allocation);
        let (mut walker, mut jumper) = (TestWorker::prepared(&run, u64::MAX), TestWorker::prepared(&run, 0));
        let sparsities = if allocation == "owl" { vec![] } else { vec![0.3, 0.5, 0.7] };
        let mut last = None;
        for layer in 0..LAYERS {
            let source = if layer == 0 { embedded(&[]) } else { held(layer) };
            let work = Work::Survey(LayerIndex(layer), source, sparsities.clone());
            let Outcome::Surveyed { survey, .. } = walker.outcome(&run, Unit::Forward(LayerIndex(layer)), work).await
            else {
                panic!("a survey is surveyed")
            };
            let shares = survey.curves.iter().map(|curve| curve.share);
            assert!(shares.clone().all(|share| share > 0.0 && share.is_finite()), "{name}: {survey:?}");
            for curve in &survey.curves {
                assert!(curve.errors.windows(2).all(|pair| pair[0] < pair[1]), "{name}: {curve:?}");
            }
            let outlying = survey.outliers.is_some_and(|share| share > 0.0 && share < 0.1);
            assert_eq!((survey.curves.is_empty(), outlying), (allocation == "owl", allocation == "owl"), "{survey:?}");
            last = Some(survey);
        }
        // Nobody needs what comes out of the last layer.
        assert_eq!(walker.session.holdings().boundaries(&run.id).last(), Some(&Boundary(LAYERS - 1)));
        let layer = LayerIndex(LAYERS - 1);
        let work = Work::Survey(layer, embedded(&[]), sparsities);
        let Outcome::Surveyed { survey, .. } = jumper.outcome(&run, Unit::Forward(layer), work).await else {
            panic!("a survey is surveyed")
        };
        assert_eq!(Some(survey), last, "{name}: from the tokens, through dense layers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_without_zeros_loses_what_the_dense_model_does() {
    let run = surveyed("llama-tiny", "measured");
    let mut worker = TestWorker::prepared(&run, 0);
    let losses = async |worker: &mut TestWorker, share: u32, work: Work| match worker
        .outcome(&run, Unit::Evaluate(share), work)
        .await
    {
        Outcome::Evaluated { window_nll, .. } => window_nll,
        other => panic!("{other:?}"),
    };
    let patterns = |sparsity| Work::Try(vec![Pattern::Unstructured { sparsity }; LAYERS as usize]);
    let none = losses(&mut worker, 0, patterns(0.0)).await;
    let evaluation =
        Evaluation { model: run.model.clone(), tokens: run.tokens.clone(), run_url: run.url(), windows: vec![4] };
    // The last of five sequences is held out.
    let dense = losses(&mut worker, 1, Work::Evaluate(evaluation)).await;
    assert!(none.len() == 1 && (none[0] / dense[0] - 1.0).abs() < 1e-6, "{none:?} {dense:?}");
    let most = losses(&mut worker, 2, patterns(0.95)).await;
    // These tokens are no text, so pruning may lose less on them; but not nothing.
    assert!((most[0] / dense[0] - 1.0).abs() > 0.01, "{most:?} {dense:?}");
    let lease = worker.lease(Unit::Evaluate(3));
    worker.session.start(&run.id, lease, Work::Try(vec![HALF])).unwrap();
    assert!(worker.report().await.result.unwrap_err().message.contains("1 patterns"));
}

#[tokio::test(flavor = "multi_thread")]
async fn dense_layers_are_independent_of_each_other() {
    let run = TestRun::new("llama-tiny", "sparsegpt", "dense");
    let (mut walker, mut jumper) = (TestWorker::prepared(&run, u64::MAX), TestWorker::prepared(&run, u64::MAX));
    for layer in 0..2 {
        let source = if layer == 0 { embedded(&[]) } else { held(layer) };
        let work = Work::Forward(LayerIndex(layer), source);
        walker.outcome(&run, Unit::Forward(LayerIndex(layer)), work).await;
    }
    assert_eq!(walker.session.holdings().boundaries(&run.id), [Boundary(0), Boundary(1), Boundary(2)]);
    let walked = walker.prune(&run, 2, held(2)).await;
    let jumped = jumper.prune(&run, 2, embedded(&[])).await;
    assert_eq!(walked.0, jumped.0);
    walker.session.release(&run.id, &[Boundary(1)]);
    assert_eq!(walker.session.holdings().boundaries(&run.id), [Boundary(0), Boundary(2)]);
    walker.session.release(&run.id, &[]);
    assert!(walker.session.holdings().boundaries(&run.id).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_carried_out_once_and_a_newer_one_replaces_it() {
    let run = TestRun::new("llama-tiny", "magnitude", "pruned");
    let mut worker = TestWorker::prepared(&run, u64::MAX);
    let unit = Unit::Prune(LayerIndex(0));
    let work = prune(LayerIndex(0), embedded(&[]));
    let (first, second) = (worker.lease(unit), worker.lease(unit));
    // The device is kept busy, so that the first lease cannot end before the second comes.
    let other = worker.lease(Unit::Prune(LayerIndex(1)));
    worker.session.start(&run.id, other, prune(LayerIndex(1), embedded(&[]))).unwrap();
    for lease in [first, first, second, first, second] {
        worker.session.start(&run.id, lease, work.clone()).unwrap();
    }
    let refused = worker.report().await;
    assert_eq!(
        (refused.lease, refused.result.unwrap_err().class),
        (other, FaultClass::Bug),
        "no replay leads to layer 1"
    );
    let report = worker.report().await;
    assert_eq!(report.lease, second);
    assert_eq!(report.held, [Boundary(0), Boundary(1)]);
    worker.session.start(&run.id, second, work.clone()).unwrap();
    let third = worker.lease(unit);
    worker.session.start(&run.id, third, work).unwrap();
    assert_eq!(worker.report().await.lease, third, "the second lease was not carried out again");
}

#[tokio::test(flavor = "multi_thread")]
async fn abandoned_units_say_nothing_and_others_go_on() {
    let run = TestRun::new("llama-tiny", "sparsegpt", "pruned");
    let mut worker = TestWorker::prepared(&run, u64::MAX);
    let abandoned = worker.lease(Unit::Prune(LayerIndex(0)));
    worker.session.start(&run.id, abandoned, prune(LayerIndex(0), embedded(&[]))).unwrap();
    worker.session.abandon(&run.id, abandoned);
    let missing = worker.lease(Unit::Prune(LayerIndex(2)));
    worker.session.start(&run.id, missing, prune(LayerIndex(2), held(2))).unwrap();
    let report = worker.report().await;
    assert_eq!((report.lease, report.result.unwrap_err().class), (missing, FaultClass::RetryElsewhere));
    worker.session.drain();
    let late = worker.lease(Unit::Prune(LayerIndex(0)));
    let refused = worker.session.start(&run.id, late, prune(LayerIndex(0), embedded(&[])));
    assert!(matches!(refused, Err(SessionError::Draining)));
}

#[tokio::test(flavor = "multi_thread")]
async fn preparing_is_idempotent_and_checks_what_it_is_given() {
    let run = TestRun::new("llama-tiny", "wanda", "pruned");
    let worker = TestWorker::idle(u64::MAX);
    let lease = Lease { unit: Unit::Prune(LayerIndex(0)), worker: WorkerId(1), attempt: Attempt(1) };
    let early = worker.session.start(&run.id, lease, prune(LayerIndex(0), embedded(&[])));
    assert!(matches!(early, Err(SessionError::NotPrepared { .. })));
    let prepare = |job: &str, tokens: &Artifact| {
        worker.session.prepare(run.id.clone(), job.to_owned(), &run.url(), tokens).map_err(|error| error.fault())
    };
    let wrong = Artifact { sha256: espalier_common::digest::Digest::of(b"other"), ..run.tokens.clone() };
    assert_eq!(prepare(&run.job, &wrong).unwrap_err().class, FaultClass::RetryElsewhere);
    let other_shape = run.job.replace("\"samples\":5", "\"samples\":6");
    assert_eq!(prepare(&other_shape, &run.tokens).unwrap_err().class, FaultClass::Reject);
    prepare(&run.job, &run.tokens).unwrap();
    std::fs::remove_dir_all(run.folder.path()).unwrap();
    prepare(&run.job, &run.tokens).expect("the run is open already");
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_are_evaluated_in_the_order_asked_for_without_a_run() {
    let run = TestRun::new("llama-tiny", "wanda", "pruned");
    let mut worker = TestWorker::idle(u64::MAX);
    let evaluation = |windows: &[u32]| {
        Work::Evaluate(Evaluation {
            model: run.model.clone(),
            tokens: run.tokens.clone(),
            run_url: run.url(),
            windows: windows.to_vec(),
        })
    };
    let mut nll = async |share: u32, windows: &[u32]| match worker
        .outcome(&run, Unit::Evaluate(share), evaluation(windows))
        .await
    {
        Outcome::Evaluated { window_nll, .. } => window_nll,
        other => panic!("{other:?}"),
    };
    let all = nll(0, &[0, 1, 2]).await;
    assert_eq!(nll(1, &[2, 0]).await, [all[2], all[0]]);
    let lease = worker.lease(Unit::Evaluate(2));
    worker.session.start(&run.id, lease, evaluation(&[5])).unwrap();
    assert!(worker.report().await.result.unwrap_err().message.contains("window 5"));
}

/// A worker that others can call, and where.
fn served(run: &TestRun, tasks: &TaskGroup) -> (TestWorker, String) {
    listening(TestWorker::prepared(run, 1 << 20), tasks)
}

fn listening(worker: TestWorker, tasks: &TaskGroup) -> (TestWorker, String) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (endpoint, session, group) = (listener.endpoint(), Arc::clone(&worker.session), tasks.clone());
    tasks.spawn(async move { listener.serve(session, group.clone(), group.token()).await.unwrap() });
    (worker, endpoint)
}

/// What comes of a layer, and what was measured of its sublayers.
type Layer = (Artifact, Vec<(f64, Option<f64>)>);

impl TestWorker {
    /// Prunes two layers of a chain with these assistants: what comes of them, and how many were given up on.
    async fn with_assistants(&mut self, run: &TestRun, assistants: &[String]) -> (Vec<Layer>, u32) {
        let (layers, lost, _) = self.with_links(run, assistants).await;
        (layers, lost)
    }

    /// As above, with what joined the worker with its assistants.
    async fn with_links(&mut self, run: &TestRun, assistants: &[String]) -> (Vec<Layer>, u32, Vec<LinkUse>) {
        let (mut layers, mut lost, mut joined) = (Vec::new(), 0, Vec::new());
        for layer in (0..2).map(LayerIndex) {
            let source = if layer.0 == 0 { embedded(&[]) } else { held(layer.0) };
            let assistants = assistants.to_vec();
            // Shares that differ, by this in the first layer and by what it took in the second; the results must not.
            let gflops = (0..=assistants.len()).map(|hand| 10.0 * (1 + hand) as f64).collect();
            let (pattern, shares) = (HALF, None);
            let work = Work::Prune { layer, source, pattern, keeps_output: false, assistants, gflops, shares };
            match self.outcome(run, Unit::Prune(layer), work).await {
                Outcome::Pruned { artifact, sublayers, assistants_lost, links, .. } => {
                    let errors = sublayers.iter().map(|sublayer| (sublayer.rel_error, sublayer.held_out_error));
                    layers.push((artifact, errors.collect()));
                    lost += assistants_lost;
                    joined.extend(links);
                }
                other => panic!("{other:?}"),
            }
        }
        (layers, lost, joined)
    }
}

/// A run whose blocks are small enough that there are some to share.
fn in_small_blocks(name: &str, method: &str) -> TestRun {
    let run = TestRun::new(name, method, "pruned");
    let job = run.job.replace("\"name\":\"espalier\"", "\"name\":\"espalier\",\"row_block\":16");
    TestRun { job, ..run }
}

/// The same without held-out sequences and a target blend, so that the gram is all there is of statistics.
fn gram_alone(name: &str) -> TestRun {
    let run = in_small_blocks(name, "espalier");
    let job = run.job.replace("\"held_out\":0.2", "\"held_out\":0.0");
    assert_ne!(job, run.job);
    TestRun { job, ..run }
}

#[tokio::test(flavor = "multi_thread")]
async fn assistants_change_no_byte_whatever_the_method() {
    let methods = ["espalier", "sparsegpt", "alps", "fista", "wanda", "magnitude"];
    let runs = methods.into_iter().zip(["llama-tiny", "opt-tiny", "qwen2-tiny"].into_iter().cycle());
    let runs = runs.map(|(method, name)| (method, name, in_small_blocks(name, method)));
    for (method, name, run) in runs.chain([("the gram alone", "llama-tiny", gram_alone("llama-tiny"))]) {
        let tasks = TaskGroup::new();
        let alone = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
        let helpers: Vec<_> = (0..3).map(|_| served(&run, &tasks)).collect();
        let endpoints: Vec<String> = helpers.iter().map(|(_, endpoint)| endpoint.clone()).collect();
        for count in 1..=3 {
            let mut owner = TestWorker::prepared(&run, 1 << 20);
            assert_eq!(owner.with_assistants(&run, &endpoints[..count]).await, alone, "{name}, {method}, {count}");
            assert!(owner.session.bytes_received() > 0, "nobody helped with {method}");
            let paces = owner.session.paces().speeds(&endpoints[..count]);
            assert!(paces.is_some(), "{method}: nobody looked at how fast {count} were");
        }
        assert!(tasks.shut_down(Duration::from_secs(5)).await);
    }
}

/// Hands on what is said at `endpoint`, and hangs up once so many bytes came back from there.
async fn cut_off(tasks: &TaskGroup, endpoint: &str, after: u64) -> String {
    let target = endpoint.strip_prefix("http://").unwrap().to_owned();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let group = tasks.clone();
    tasks.spawn(async move {
        let token = group.token();
        while let Some(Ok((near, _))) = token.run_until_cancelled(listener.accept()).await {
            let far = tokio::net::TcpStream::connect(&target).await.unwrap();
            group.spawn(async move {
                let ((mut near_read, mut near_write), (far_read, mut far_write)) =
                    (near.into_split(), far.into_split());
                let mut back = far_read.take(after);
                tokio::select! {
                    _ = tokio::io::copy(&mut near_read, &mut far_write) => {}
                    _ = tokio::io::copy(&mut back, &mut near_write) => {}
                }
            });
        }
    });
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assistant_that_is_gone_costs_nothing_whenever_it_goes() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let (alone, none) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
    assert_eq!(none, 0);
    let (helper, endpoint) = served(&run, &tasks);
    // From before its first word to after its last: in the middle of either portion of sums, of parts, of blocks, of the output.
    let mut lost = Vec::new();
    let within_a_layer = (1..12).map(|step| step * 80_000);
    for after in [0, 100, 5_000].into_iter().chain(within_a_layer).chain([1 << 30]) {
        let endpoint = cut_off(&tasks, &endpoint, after).await;
        let (layers, given_up) =
            TestWorker::prepared(&run, u64::MAX).with_assistants(&run, std::slice::from_ref(&endpoint)).await;
        assert_eq!(layers, alone, "cut off after {after} bytes");
        lost.push(given_up);
    }
    assert_eq!((lost[0], lost[1], *lost.last().unwrap()), (2, 2, 0), "{lost:?}");
    assert!(lost.iter().filter(|&&lost| lost > 0).count() > 5, "{lost:?}");
    // Nobody there, and somebody who is prepared for nothing.
    let stranger = TestWorker::idle(u64::MAX);
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let (unprepared, session, group) = (listener.endpoint(), Arc::clone(&stranger.session), tasks.clone());
    tasks.spawn(async move { listener.serve(session, group.clone(), group.token()).await.unwrap() });
    let useless = ["http://127.0.0.1:1".to_owned(), unprepared, endpoint];
    let (layers, given_up) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &useless).await;
    assert_eq!((layers, given_up), (alone, 4));
    drop(helper);
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unit_of_its_own_ends_an_assistance() {
    let (run, tasks) = (in_small_blocks("llama-tiny", "espalier"), TaskGroup::new());
    let (alone, _) = TestWorker::prepared(&run, u64::MAX).with_assistants(&run, &[]).await;
    let (mut helper, endpoint) = served(&run, &tasks);
    let mut owner = TestWorker::prepared(&run, u64::MAX);
    let assistants = [endpoint];
    let (shared, own) = tokio::join!(owner.with_assistants(&run, &assistants), helper.prune(&run, 0, embedded(&[])));
    assert_eq!((&shared.0, &own.0), (&alone, &alone[0].0));
    assert!(tasks.shut_down(Duration::from_secs(5)).await);
}

#[tokio::test]
async fn a_worker_that_does_not_see_the_run_says_so_and_may_be_asked_again() {
    let run = TestRun::new("llama-tiny", "magnitude", "pruned");
    let elsewhere = tempfile::tempdir().unwrap();
    let url = elsewhere.path().display().to_string();
    let worker = TestWorker::idle(u64::MAX);
    let refused = worker.session.prepare(run.id.clone(), run.job.clone(), &url, &run.tokens).unwrap_err();
    let fault = refused.fault();
    assert!(fault.message.contains(&url) && fault.message.contains("all machines have"), "{}", fault.message);
    assert!(fault.message.contains("tokens/calibration"), "{}", fault.message);
    assert_eq!(fault.class, FaultClass::RetryElsewhere);
    worker.attached_to(&run);
}
