//! Traces: a collector is told of a run as one tree, from the coordinator through every worker that had a part in a layer, also of
//! what was lost; and a collector that is not there is nobody's trouble.

use std::collections::BTreeSet;
use std::net::TcpListener;

use anyhow::Result;
use espalier_common::clock::Stopwatch;
use espalier_common::ids::Unit;
use harness::checkpoint::same_files;
use harness::collector::{Collector, Span};
use harness::process::{PATIENCE, Workplace, pause, proceed};
use harness::{golden, tiny};

use crate::cluster::Cluster;
use crate::past::{LAYERS, commits, outstanding};

const ENDPOINT: &str = "ESPALIER__TRACE__ENDPOINT";
/// Groups of a layer of LLaMA.
const GROUPS: usize = 4;
/// Processes of one machine have one clock, but what a phase took is measured by another.
const SLACK_NANOS: u64 = 2_000_000;

/// A job whose layers are shared, and take long enough to be met at work.
fn prune(more: &[&str]) -> Vec<String> {
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let (model, text) = (model.display().to_string(), text.display().to_string());
    let arguments = ["prune", &model, "--output", "out", "--run", "run", "--calibration", &text, "--samples", "32"];
    let how = ["--seq-len", "128", "--method", "espalier", "--propagation", "pruned", "--set", "method.row_block=32"];
    arguments.iter().chain(&how).chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn traced(url: &str) -> Workplace {
    let mut workplace = Workplace::new();
    workplace.set(ENDPOINT, url);
    // What a page needs is in the same environment, and is no part of a job.
    workplace.set("ESPALIER__HTTP__LISTEN", "127.0.0.1:0");
    workplace
}

/// Ends whatever lives of a cluster, so that all its spans are sent.
fn end(cluster: Cluster) -> Result<()> {
    let Cluster { coordinator, workers, workplace, .. } = cluster;
    for mut process in workers.into_iter().map(|member| member.process).chain([coordinator]) {
        if process.ended()?.is_none() {
            process.interrupt()?;
            process.finish(PATIENCE)?;
        }
    }
    drop(workplace);
    Ok(())
}

/// The spans of a trace, as a tree.
struct Tree(Vec<Span>);

impl Tree {
    /// Checks that every span is of one trace, has its parent, and lies within it.
    fn of(spans: Vec<Span>) -> Self {
        let tree = Self(spans);
        let ids: BTreeSet<_> = tree.0.iter().map(|span| &span.id).collect();
        assert_eq!(ids.len(), tree.0.len(), "two spans have one name");
        let traces: BTreeSet<_> = tree.0.iter().map(|span| &span.trace).collect();
        assert_eq!(traces.len(), 1, "{traces:?}");
        for span in &tree.0 {
            assert!(span.start <= span.end, "{span:?}");
            assert!(span.parent.is_empty() || ids.contains(&span.parent), "no parent of {span:?}");
            let parent = tree.0.iter().find(|parent| parent.id == span.parent);
            assert!(
                parent.is_none_or(|parent| span.start + SLACK_NANOS >= parent.start),
                "{span:?} began before {parent:?}"
            );
        }
        tree
    }

    fn roots(&self) -> Vec<&Span> {
        self.0.iter().filter(|span| span.parent.is_empty()).collect()
    }

    fn below<'a>(&'a self, parent: &'a Span, name: &'a str) -> impl Iterator<Item = &'a Span> {
        self.0.iter().filter(move |span| span.parent == parent.id && span.name == name)
    }

    fn only<'a>(&'a self, parent: &'a Span, name: &'a str) -> &'a Span {
        let found: Vec<_> = self.below(parent, name).collect();
        assert_eq!(found.len(), 1, "{name} below {parent:?}");
        found[0]
    }
}

/// Without parts of what was never told to have ended: a worker that is killed, or ends within a unit, takes that with it.
fn whole(mut spans: Vec<Span>) -> Vec<Span> {
    loop {
        let ids: BTreeSet<_> = spans.iter().map(|span| span.id.clone()).collect();
        let before = spans.len();
        spans.retain(|span| {
            let has_parent = span.parent.is_empty() || ids.contains(&span.parent);
            assert!(has_parent || span.from.0 == "espalier-worker", "no parent of {span:?}");
            has_parent
        });
        if spans.len() == before {
            return spans;
        }
    }
}

/// Checks a unit that pruned a layer: what its worker did for each group, and what another did for it. Gives the workers.
fn pruned<'a>(tree: &'a Tree, unit: &'a Span) -> BTreeSet<&'a str> {
    assert_eq!((unit.get("espalier.outcome"), &unit.error), ("committed", &None), "{unit:?}");
    let work = tree.only(unit, "prune");
    assert_eq!((work.from.0.as_str(), work.from.1.as_str()), ("espalier-worker", unit.get("espalier.worker")));
    assert!(tree.below(work, "load").count() > 0 && tree.below(work, "store").count() > 0);
    for phase in ["gram", "solve", "verify"] {
        let groups: BTreeSet<_> = tree.below(work, phase).map(|span| span.get("espalier.group")).collect();
        assert_eq!(groups, ["0", "1", "2", "3"][..GROUPS].iter().copied().collect(), "{phase}");
    }
    let mut workers = BTreeSet::from([work.from.1.as_str()]);
    for lent in tree.below(work, "lend").filter(|lent| lent.error.is_none()) {
        let assist = tree.only(lent, "assist");
        assert_ne!(assist.from.1, work.from.1);
        for phase in ["gram", "solve", "verify"] {
            assert!(tree.below(assist, phase).count() > 0, "{phase} in {assist:?}");
        }
        workers.insert(assist.from.1.as_str());
    }
    workers
}

#[test]
fn a_layer_is_one_tree_over_all_processes() {
    let collector = Collector::start().unwrap();
    let cluster = Cluster::start_in(traced(&collector.url), None, 2, &[]).unwrap();
    cluster.submit(&prune(&[])).unwrap().finish(PATIENCE).unwrap().success().unwrap();
    end(cluster).unwrap();
    let tree = Tree::of(collector.spans());
    let [run] = tree.roots()[..] else { panic!("{:?}", tree.roots()) };
    assert_eq!((run.name.as_str(), run.from.0.as_str(), &run.error), ("run", "espalier", &None));
    assert_eq!((run.get("espalier.method"), run.get("espalier.pattern")), ("espalier", "50 %"), "{run:?}");
    assert!(run.get("espalier.model").contains("llama-tiny") && !run.get("espalier.run").is_empty());
    tree.only(run, "plan");
    tree.only(run, "assemble");
    let mut together = 0;
    for number in 0..LAYERS {
        let name = format!("layer {number}");
        let layer = tree.only(run, &name);
        let unit = format!("prune {number}");
        together += usize::from(pruned(&tree, tree.only(layer, &unit)).len() == 2);
    }
    assert!(together > 0, "no layer was shared");
}

/// Kills the worker that has a lease, once a layer is committed. All stand still meanwhile, so that none ends its unit.
fn kill_one_at_work(cluster: &mut Cluster) -> Result<u32> {
    loop {
        let has_begun = |cluster: &Cluster| (!commits(&cluster.run()).is_empty()).then(|| cluster.at_work())?;
        cluster.wait_until("a lease behind a commit", has_begun)?;
        let processes: Vec<u32> = cluster.workers.iter().map(|member| member.process.id()).collect();
        processes.iter().try_for_each(|&process| pause(process))?;
        let found = outstanding(&cluster.run()).and_then(|lease| Some((lease, cluster.position(lease.worker)?)));
        if let Some((_, position)) = found {
            cluster.workers[position].process.kill()?;
        }
        let others = processes.iter().enumerate().filter(|(at, _)| found.is_none_or(|(_, killed)| killed != *at));
        others.map(|(_, process)| *process).try_for_each(proceed)?;
        if let Some((lease, _)) = found {
            let Unit::Prune(layer) = lease.unit else { continue };
            return Ok(layer.0);
        }
    }
}

#[test]
fn a_lost_attempt_is_a_span_with_an_error() {
    let collector = Collector::start().unwrap();
    let mut workplace = traced(&collector.url);
    workplace.set("ESPALIER__COORDINATOR__WORKER_SILENCE_SECONDS", "3");
    let mut cluster = Cluster::start_in(workplace, None, 2, &[]).unwrap();
    let submitted = cluster.submit(&prune(&[])).unwrap();
    let layer = kill_one_at_work(&mut cluster).unwrap();
    submitted.finish(PATIENCE).unwrap().success().unwrap();
    end(cluster).unwrap();
    let tree = Tree::of(whole(collector.spans()));
    let [run] = tree.roots()[..] else { panic!("{:?}", tree.roots()) };
    for number in 0..LAYERS as u32 {
        let (name, unit) = (format!("layer {number}"), format!("prune {number}"));
        let of_layer = tree.only(run, &name);
        let mut attempts: Vec<_> = tree.below(of_layer, &unit).collect();
        attempts.sort_by_key(|attempt| attempt.start);
        let last = attempts.pop().unwrap();
        if number >= layer {
            // What it did before, the killed worker may not have had the time to tell.
            pruned(&tree, last);
        }
        assert_eq!(attempts.len(), usize::from(number == layer), "{attempts:?}");
        for attempt in attempts {
            let error = attempt.error.as_deref().unwrap_or_default();
            // It may have died before it could say that it begins.
            let is_told = error.starts_with("the worker is lost: ") || error.contains(" does not answer PruneLayer: ");
            assert!(is_told && attempt.get("espalier.outcome") == "failed", "{attempt:?}");
            assert_ne!(attempt.get("espalier.worker"), last.get("espalier.worker"));
            assert!(attempt.end <= last.start, "{attempt:?} {last:?}");
        }
    }
}

#[test]
fn a_run_that_is_taken_up_again_goes_on_with_its_trace() {
    let collector = Collector::start().unwrap();
    let workplace = traced(&collector.url);
    let run = workplace.path().join("run");
    let mut running = workplace.start(prune(&["--workers", "2"])).unwrap();
    running.wait_until("a commit", || (!commits(&run).is_empty()).then_some(())).unwrap();
    running.interrupt().unwrap();
    assert_eq!(running.finish(PATIENCE).unwrap().code(), Some(75));
    workplace.run(["resume", "run", "--workers", "2"]).unwrap().success().unwrap();
    let tree = Tree::of(whole(collector.spans()));
    let mut lives = tree.roots();
    lives.sort_by_key(|life| life.start);
    let [first, second] = lives[..] else { panic!("{lives:?}") };
    assert_eq!((first.error.as_deref(), &second.error), (Some("interrupted"), &None));
    let before: usize = second.get("espalier.layers_committed_before").parse().unwrap();
    assert!((1..=LAYERS).contains(&before));
    let layers = (0..LAYERS).filter(|number| tree.below(second, &format!("layer {number}")).next().is_some()).count();
    assert_eq!(layers, LAYERS - before);
}

/// Nobody listens; somebody accepts and says nothing.
#[test]
fn a_collector_that_is_not_there_costs_nothing_but_its_spans() {
    let reference = Workplace::new();
    let watch = Stopwatch::start();
    reference.run(prune(&["--workers", "2"])).unwrap().success().unwrap();
    let undisturbed = watch.seconds();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let hole = format!("http://{}", silent.local_addr().unwrap());
    for url in ["http://127.0.0.1:1", &hole] {
        let workplace = traced(url);
        let watch = Stopwatch::start();
        workplace.run(prune(&["--workers", "2"])).unwrap().success().unwrap();
        // Coordinator and workers say farewell for two seconds each; the rest is a busy machine's.
        assert!(watch.seconds() < 3.0 * undisturbed + 30.0, "{} s, not {undisturbed}", watch.seconds());
        same_files(&reference.path().join("out"), &workplace.path().join("out")).unwrap();
    }
}

#[test]
fn a_collector_beyond_loopback_is_called_over_tls_only() {
    for (url, why) in [("http://192.0.2.1:4317", "is not encrypted"), ("https://192.0.2.1:4317", "needs [tls]")] {
        let workplace = traced(url);
        let refused = workplace.run(prune(&[])).unwrap();
        assert_eq!(refused.code(), Some(65), "{}", refused.stderr);
        assert!(refused.stderr.contains(why), "{}", refused.stderr);
        let serve = ["serve", "--coordinator", "http://127.0.0.1:1"];
        let worker = workplace.start_program("espalier-worker", serve).unwrap().finish(PATIENCE).unwrap();
        assert_eq!(worker.code(), Some(65), "{}", worker.stderr);
        assert!(worker.stderr.contains(why), "{}", worker.stderr);
    }
}
