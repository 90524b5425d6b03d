//! One run from its job to its report: tokens → outline → plan → pruning → checkpoint → evaluation.

mod sharing;
pub(crate) mod survey;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use espalier_common::checkpoint::Checkpoint;
use espalier_common::clock::{Clock, Stopwatch, unix_millis, unix_seconds};
use espalier_common::config;
use espalier_common::digest::Digest;
use espalier_common::ids::{Boundary, LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::job::{EvaluationSpec, JobSpec, Layout, Propagation};
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::{Artifact, Outcome};
use espalier_common::store::{BlobStore, Placed};
use espalier_common::structure::Kept;
use espalier_common::wire::Source;
use espalier_gate::Tracer;
use espalier_gate::trace::Open;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::driver::{Driver, Preparation, Purpose};
use crate::error::RunError;
use crate::events::{EventLog, Phase, RunEvent};
use crate::fingerprint::{self, Fingerprint};
use crate::fleet::{CallError, FleetEvent, Help, Roster, UnitCall};
use crate::journal::{self, EvaluatedModel, Journal, JournalRecord, RunCreated, Timed, WorkerTotals};
use crate::layout::StructuredRecord;
use crate::plan::cost;
use crate::plan::strategy::{Asked, Strategy};
use crate::plan::widths::{self, WidthError};
use crate::report::{self, Report};
use crate::schedule::{Limits, Record, Scheduler, Shape};
use crate::trace::UnitSpans;
use crate::{assemble, calibration, evaluate, page, preflight, trace};
pub(crate) use told::about;
use told::{Remembering, append_timed, pruned_before};

/// Everything about a run that is no part of its job: where and with whom.
pub struct Setting {
    /// Where the run keeps its journal, artifacts and report: a folder, or a URL.
    pub run_url: String,
    /// Its workers.
    pub roster: Roster,
    /// Workers to wait for before anything is planned.
    pub workers_wanted: usize,
    /// How long it waits for them.
    pub workers_patience: Duration,
    /// Its followers.
    pub events: EventLog,
    /// Its time.
    pub clock: Arc<dyn Clock>,
    /// Its patience.
    pub limits: Limits,
    /// How its workers are to share the calibration, if somebody says.
    pub strategy: Option<Asked>,
    /// Whether a worker that is lost before anything is planned may be followed by another: so in a cluster, not on one machine.
    pub workers_return: bool,
    /// Set when somebody wants it to stop.
    pub stop: CancellationToken,
    /// What its spans are told to.
    pub tracer: Tracer,
}

/// When things happened, which the journal does not tell: kept beside the report.
pub(crate) const TIMELINE: &str = "timeline.json";

/// A run that was opened: created, or taken up where an earlier process left it.
pub struct Run {
    setting: Setting,
    id: RunId,
    job: JobSpec,
    dense: Arc<dyn Checkpoint>,
    tokens: Artifact,
    fingerprint: Digest,
    store: Arc<dyn BlobStore>,
    journal: Timed,
    past: Vec<JournalRecord>,
    watch: Stopwatch,
    span: Open,
}

impl Run {
    /// Opens the run at `setting.run_url`: creates it, or takes it up if a run of the very same job is there.
    ///
    /// # Errors
    /// `Reject`-like errors for a wrong job or input, before anything is written; `Differs` if another run is there; `Journal`
    /// if another coordinator holds it.
    pub fn open(mut job: JobSpec, setting: Setting) -> Result<Self, RunError> {
        let watch = Stopwatch::start();
        job.validate()?;
        let store = config::open_store(&setting.run_url)?;
        let frozen = fingerprint::read(store.as_ref())?;
        // A run that is taken up again may have written its output already; assembling looks closer.
        if frozen.is_none() {
            preflight::check_places(&config::output_target(&job.output.uri)?, store.as_ref())?;
        }
        setting.events.note(RunEvent::Phase { phase: Phase::Tokenise });
        let (dense, pinned) = config::open_model_pinned(&job.model.source)?;
        job.model.source = pinned;
        preflight::check_source(dense.as_ref())?;
        let spec = &job.calibration;
        let source = config::open_text(&spec.source)?;
        let block =
            calibration::sequences(source.path(), dense.as_ref(), spec.samples, spec.sequence_length, spec.seed)?;
        // Read now so that a wrong text is found before hours of pruning, not after.
        if let Some(spec) = &job.evaluation {
            evaluate::windows(spec, dense.as_ref())?;
        }
        let fingerprint = Fingerprint::take(&job, dense.as_ref(), block.digest())?;
        let same = |frozen: &Fingerprint| match frozen.differences(&fingerprint)[..] {
            [] => Ok(()),
            ref lines => Err(RunError::Differs { run: setting.run_url.clone(), differences: lines.join("; ") }),
        };
        // Looked at before the journal is opened, so that nobody is fenced by a job that is refused.
        frozen.as_ref().map_or(Ok(()), same)?;
        if let Some(folder) = store.directory() {
            std::fs::create_dir_all(folder).map_err(|error| RunError::folder(folder, error))?;
        }
        let (journal, mut past) = journal::open(&store)?;
        let mut journal = Timed::from(journal);
        // Now nobody else can create it; but somebody may have, a moment ago.
        if fingerprint::freeze(store.as_ref(), &fingerprint)? == Placed::AlreadyThere {
            fingerprint::read(store.as_ref())?.as_ref().map_or(Ok(()), same)?;
        }
        let tokens = evaluate::put_block(store.as_ref(), &block)?;
        if !past.iter().any(|record| !matches!(record, JournalRecord::TakenOver(_))) {
            let id = RunId(format!("{}-{}", unix_seconds(), &fingerprint.model.to_string()[..8]));
            let created = Box::new(RunCreated {
                run: id,
                job: job.clone(),
                tokens: tokens.clone(),
                model_fingerprint: fingerprint.model,
                created: unix_seconds(),
            });
            store.put("job.toml", toml::to_string_pretty(&job).map_err(RunError::job_text)?.as_bytes())?;
            journal.append(&JournalRecord::Created(created.clone()))?;
            past.push(JournalRecord::Created(created));
        }
        let id = past.iter().find_map(created_run).ok_or_else(|| RunError::Headless(setting.run_url.clone()))?;
        let committed = prune_records(&past).filter_map(committed_layer).count();
        let (sublayers, phases) = pruned_before(&past);
        let about = about(&job)?;
        let span = trace::run(&setting.tracer, &id, &about, committed);
        setting.events.note(RunEvent::Opened {
            run: id.clone(),
            url: setting.run_url.clone(),
            committed,
            about: Some(Box::new(about)),
            sublayers,
            phases,
        });
        Ok(Self { setting, id, job, dense, tokens, fingerprint: fingerprint.model, store, journal, past, watch, span })
    }

    /// The run's id.
    pub fn id(&self) -> &RunId {
        &self.id
    }

    /// Brings the run to its end and returns its report, which is then also in `report.json`.
    ///
    /// # Errors
    /// See [`RunError`]. What is committed stays committed: the run can be taken up again unless its input was wrong.
    pub async fn execute(mut self) -> Result<Report, RunError> {
        let result = self.execute_steps().await;
        self.span.close(result.as_ref().map(drop));
        let seconds = self.watch.seconds();
        match &result {
            Ok(_) => {}
            Err(error) => {
                let (reason, exit_code) = (error.to_string(), Some(error.exit_code()));
                // The error that stopped the run matters more than one in writing it down.
                let journal_seconds = self.journal.seconds();
                let _ = self.journal.append(&JournalRecord::Stopped { reason, seconds, journal_seconds, exit_code });
            }
        }
        result
    }

    async fn execute_steps(&mut self) -> Result<Report, RunError> {
        let planning = self.span.scope().open("plan");
        let planned = async {
            let pinned = self.gather_workers().await?;
            Ok((pinned, self.plan().await?))
        };
        let planned: Result<_, RunError> = planned.await;
        planning.close(planned.as_ref().map(drop));
        let (_pinned, (outline, patterns)) = planned?;
        let pattern = report::overall_pattern(&self.job, &outline)?.to_string();
        self.setting.events.note(RunEvent::Planned { pattern });
        let layers = self.prune(&outline, &patterns).await?;
        self.note_workers()?;
        let assembling = self.span.scope().open("assemble");
        let assembled = self.assemble(&outline, &layers);
        assembling.close(assembled.as_ref().copied());
        assembled?;
        if let Some(spec) = self.job.evaluation.clone() {
            let dense = self.job.model.source.clone();
            self.evaluate(&spec, EvaluatedModel::Dense, dense).await?;
            let output = self.job.output.uri.clone();
            self.evaluate(&spec, EvaluatedModel::Pruned, output).await?;
            self.note_workers()?;
        }
        let (seconds, journal_seconds) = (self.watch.seconds(), self.journal.seconds());
        self.append(JournalRecord::Finished { seconds, journal_seconds })?;
        let report = report::build(&self.past)?;
        let json = serde_json::to_vec_pretty(&report).expect("a report is plain data");
        self.store.put("report.json", &json)?;
        let mut view = self.setting.events.view();
        view.apply(unix_millis(), &RunEvent::Finished { report: Box::new(report.clone()) });
        let timeline = serde_json::to_vec(&view.timeline()).expect("a timeline is plain data");
        self.store.put(TIMELINE, &timeline)?;
        self.store.put("report.html", page::frozen(&view).as_bytes())?;
        self.collect_garbage()?;
        info!(run = %self.id, "run finished");
        Ok(report)
    }

    fn append(&mut self, record: JournalRecord) -> Result<(), RunError> {
        append_timed(&mut self.journal, &record, &self.setting.events)?;
        self.past.push(record);
        Ok(())
    }

    fn job_json(&self) -> String {
        serde_json::to_string(&self.job).expect("a job is plain data")
    }

    /// Asks a worker what the model is, and gives every layer its pattern.
    async fn plan(&mut self) -> Result<(ModelOutline, Vec<Pattern>), RunError> {
        self.setting.events.note(RunEvent::Phase { phase: Phase::Inspect });
        let planned = self.past.iter().find_map(|record| match record {
            JournalRecord::Planned { outline, patterns } => Some((outline.clone(), patterns.clone())),
            _ => None,
        });
        let outline = inspect(&self.setting, &self.job).await?;
        self.choose_strategy(&outline)?;
        if let Some((planned, patterns)) = planned {
            if planned.method_version != outline.method_version {
                return Err(RunError::MethodVersion {
                    method: self.job.method.name.clone(),
                    frozen: planned.method_version,
                    found: outline.method_version,
                });
            }
            return Ok((planned, patterns));
        }
        let (dense, known) = (Arc::clone(&self.dense), outline.clone());
        let checked = tokio::task::spawn_blocking(move || preflight::check_untouched(dense.as_ref(), &known)).await;
        checked.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
        if let Some(structure) = &outline.structure {
            let patterns = widths::widths(structure, &asked(&self.job)?)?;
            self.append(JournalRecord::Planned { outline: outline.clone(), patterns: patterns.clone() })?;
            return Ok((outline, patterns));
        }
        refuse_structured_keys(&self.job)?;
        if outline.imports_zeros {
            let patterns = vec![Pattern::Imported; outline.layers.len()];
            self.append(JournalRecord::Planned { outline: outline.clone(), patterns: patterns.clone() })?;
            return Ok((outline, patterns));
        }
        let pattern = self.job.pattern()?;
        for sublayer in outline.layers.iter().flat_map(|layer| layer.sublayers()) {
            pattern.validate_for(&sublayer.tensor, sublayer.columns).map_err(espalier_common::job::JobError::from)?;
        }
        let patterns = self.allocate(&outline, pattern).await?;
        self.append(JournalRecord::Planned { outline: outline.clone(), patterns: patterns.clone() })?;
        Ok((outline, patterns))
    }

    async fn prune(
        &mut self,
        outline: &ModelOutline,
        patterns: &[Pattern],
    ) -> Result<BTreeMap<LayerIndex, Artifact>, RunError> {
        self.setting.events.note(RunEvent::Phase { phase: Phase::Prune { layers: outline.layers.len() } });
        let layer_bytes = outline.layers.iter().map(|layer| layer.bytes).collect();
        let strategy = self.chosen_strategy().map_or(Strategy::Layers, |choice| choice.strategy);
        let most_hands = cost::most_hands(&self.job);
        let shape = Shape::of_pruning(self.job.propagation.mode, strategy, layer_bytes, most_hands);
        let scheduler = Scheduler::replay(shape, self.setting.limits, prune_records(&self.past));
        let purpose = Pruning {
            propagation: self.job.propagation.mode,
            patterns: patterns.to_vec(),
            preparation: Preparation {
                job_json: self.job_json(),
                run_url: self.store.url().to_owned(),
                tokens: self.tokens.clone(),
            },
        };
        self.drive(scheduler, Arc::new(purpose), UnitSpans::of_layers(&self.span)).await
    }

    /// Drives a schedule; what the journal got meanwhile is in `self.past` afterwards.
    async fn drive(
        &mut self,
        scheduler: Scheduler,
        purpose: Arc<dyn Purpose>,
        trace: UnitSpans,
    ) -> Result<BTreeMap<LayerIndex, Artifact>, RunError> {
        let committed = prune_records(&self.past).filter_map(committed_layer).collect();
        let stored = prune_records(&self.past).filter_map(stored_boundary).collect();
        let events = &self.setting.events;
        let mut journal = Remembering { journal: &mut self.journal, past: &mut self.past, events };
        let mut driver = Driver {
            run: &self.id,
            roster: &self.setting.roster,
            journal: &mut journal,
            events: &self.setting.events,
            clock: self.setting.clock.as_ref(),
            alike: !self.setting.workers_return,
            stop: &self.setting.stop,
            committed,
            stored,
            store: Arc::clone(&self.store),
            trace,
        };
        driver.drive(scheduler, purpose).await?;
        Ok(driver.committed)
    }

    fn assemble(&mut self, outline: &ModelOutline, layers: &BTreeMap<LayerIndex, Artifact>) -> Result<(), RunError> {
        if self.past.iter().any(|record| matches!(record, JournalRecord::Assembled { .. })) {
            return Ok(());
        }
        self.setting.events.note(RunEvent::Phase { phase: Phase::Assemble });
        let structured = structured_record(&self.past, &self.job, outline);
        let files = assemble::assemble(&assemble::Parts {
            job: &self.job,
            dense: self.dense.as_ref(),
            model: self.fingerprint,
            tokens: self.tokens.sha256,
            method_version: &outline.method_version,
            method_params: &outline.method_params,
            imports_zeros: outline.imports_zeros,
            store: self.store.as_ref(),
            layers,
            structured: structured.as_ref(),
            stop: &self.setting.stop,
        })
        .map_err(|error| match error {
            // The model was read before: what fails now is the disk, or something has taken the output's place.
            RunError::Checkpoint(error) => RunError::Write(error),
            other => other,
        })?;
        self.append(JournalRecord::Assembled { files })
    }

    async fn evaluate(&mut self, spec: &EvaluationSpec, model: EvaluatedModel, uri: String) -> Result<(), RunError> {
        let block = evaluate::windows(spec, self.dense.as_ref())?;
        let count = block.sequences();
        self.setting.events.note(RunEvent::Phase { phase: Phase::Evaluate { model, windows: count } });
        let done: Vec<Record> = self.past.iter().filter_map(|record| evaluation_record(record, model)).collect();
        let shares = match evaluate::shares_before(model, &self.past, count) {
            Some(shares) => shares,
            None => {
                let shares = evaluate::shares_for(self.setting.roster.members().len(), count);
                self.append(JournalRecord::Shared { model, shares })?;
                shares
            }
        };
        let tokens = evaluate::put_block(self.store.as_ref(), &block)?;
        let purpose = evaluate::Evaluation {
            model,
            uri,
            tokens,
            run_url: self.store.url().to_owned(),
            windows: count as u32,
            shares,
        };
        let shape = Shape::Evaluate { first: model.first_share(), shares };
        let scheduler = Scheduler::replay(shape, self.setting.limits, &done);
        let stage = match model {
            EvaluatedModel::Dense => "evaluate dense",
            EvaluatedModel::Pruned => "evaluate pruned",
        };
        self.drive(scheduler, Arc::new(purpose), UnitSpans::of_stage(&self.span, stage)).await?;
        Ok(())
    }

    fn note_workers(&mut self) -> Result<(), RunError> {
        let mut totals = WorkerTotals {
            coordinator_peak_rss_bytes: espalier_common::memory::peak_rss_bytes(),
            ..WorkerTotals::default()
        };
        for member in self.setting.roster.everyone().into_values() {
            totals.gflops.insert(member.offer.name.clone(), member.offer.gflops);
            totals.devices.insert(member.offer.name.clone(), member.offer.device);
            let peak = totals.peak_rss_bytes.entry(member.offer.name).or_default();
            *peak = (*peak).max(member.peak_rss_bytes);
            totals.bytes_received += member.bytes_received;
        }
        self.append(JournalRecord::Workers(totals))
    }

    /// Drops the artifacts but the calibration tokens: the checkpoint holds all else that is worth keeping.
    fn collect_garbage(&self) -> Result<(), RunError> {
        for folder in ["layers", "activations"] {
            for name in self.store.list(folder)? {
                self.store.delete(&name)?;
            }
        }
        Ok(self.store.sweep()?)
    }
}

/// Workers of this machine are there in less, and nobody need be told.
const UNTOLD: Duration = Duration::from_secs(1);

/// Waits until as many workers as the setting wants are there.
///
/// # Errors
/// `WorkerDiedEarly`, `TooFewWorkers`, `Interrupted`.
pub async fn wait_for_workers(setting: &Setting) -> Result<(), RunError> {
    let (present, mut fleet) = setting.roster.listen();
    // One that registers just now may be told of as well.
    let mut here: BTreeSet<WorkerId> = present.into_iter().collect();
    let wait = async {
        let wanted = setting.workers_wanted;
        let mut silence = std::pin::pin!(tokio::time::sleep(UNTOLD));
        let mut told = None;
        while here.len() < wanted {
            if silence.is_elapsed() && told.replace(here.len()) != Some(here.len()) {
                setting.events.note(RunEvent::Phase { phase: Phase::AwaitWorkers { here: here.len(), wanted } });
            }
            let event = tokio::select! {
                event = fleet.recv() => event,
                () = &mut silence, if !silence.is_elapsed() => continue,
            };
            match event {
                Some(FleetEvent::Joined(worker)) => drop(here.insert(worker)),
                Some(FleetEvent::Heartbeat { .. } | FleetEvent::Report { .. }) => {}
                Some(FleetEvent::Lost(worker)) if setting.workers_return => drop(here.remove(&worker)),
                Some(FleetEvent::Lost(_)) | None => return false,
            }
        }
        true
    };
    tokio::select! {
        () = setting.stop.cancelled() => Err(RunError::Interrupted),
        came = tokio::time::timeout(setting.workers_patience, wait) => match came {
            Ok(true) => Ok(()),
            Ok(false) => Err(RunError::WorkerDiedEarly),
            Err(_) => {
                let (wanted, seconds) = (setting.workers_wanted, setting.workers_patience.as_secs());
                Err(RunError::TooFewWorkers { wanted, seconds })
            }
        },
    }
}

/// Asks a worker what the job's model is made of; the next one if it does not answer.
///
/// # Errors
/// `Fault` if the job or its model is wrong, `Call` if nobody answers, `WorkerDiedEarly` if nobody is there, `Interrupted`.
pub async fn inspect(setting: &Setting, job: &JobSpec) -> Result<ModelOutline, RunError> {
    let job_json = serde_json::to_string(job).expect("a job is plain data");
    let mut last = None;
    for member in setting.roster.members().into_values() {
        let inspected = tokio::select! {
            () = setting.stop.cancelled() => return Err(RunError::Interrupted),
            inspected = member.client.inspect(job_json.clone()) => inspected,
        };
        match inspected {
            Ok(outline) => return Ok(outline),
            Err(CallError::Fault(fault)) => return Err(RunError::Fault(fault)),
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or(RunError::WorkerDiedEarly, RunError::Call))
}

fn created_run(record: &JournalRecord) -> Option<RunId> {
    match record {
        JournalRecord::Created(created) => Some(created.run.clone()),
        _ => None,
    }
}

fn prune_records(past: &[JournalRecord]) -> impl Iterator<Item = &Record> {
    past.iter().filter_map(|record| match record {
        JournalRecord::Prune(record) => Some(record),
        _ => None,
    })
}

fn committed_layer(record: &Record) -> Option<(LayerIndex, Artifact)> {
    match record {
        Record::Committed { lease, outcome: Outcome::Pruned { artifact, .. } } => match lease.unit {
            Unit::Prune(layer) => Some((layer, artifact.clone())),
            Unit::Forward(_) | Unit::Evaluate(_) => None,
        },
        _ => None,
    }
}

fn stored_boundary(record: &Record) -> Option<(Boundary, Artifact)> {
    match record {
        Record::Committed { lease, outcome: Outcome::Pruned { boundary: Some(artifact), .. } } => match lease.unit {
            Unit::Prune(layer) => Some((Boundary(layer.0 + 1), artifact.clone())),
            Unit::Forward(_) | Unit::Evaluate(_) => None,
        },
        _ => None,
    }
}

/// What the job asks of a structured method.
fn asked(job: &JobSpec) -> Result<widths::Asked, RunError> {
    Ok(widths::Asked {
        share: job.pattern()?.sparsity(),
        allocation: job.pattern.allocation,
        spread: job.pattern.allocation_spread,
        layout: layout_of(job),
        round_to: job.pattern.round_to,
        kv_heads: job.pattern.kv_heads,
        unit: job.pattern.attention.unwrap_or_default(),
        tensor_parallel: job.output.tensor_parallel.unwrap_or(1),
    })
}

fn layout_of(job: &JobSpec) -> Layout {
    job.output.layout.unwrap_or(Layout::Uniform)
}

/// Keys that only structured methods honour are refused rather than ignored.
fn refuse_structured_keys(job: &JobSpec) -> Result<(), WidthError> {
    let keys = [
        ("[pattern] round_to", job.pattern.round_to.is_some()),
        ("[pattern] kv_heads", job.pattern.kv_heads.is_some()),
        ("[pattern] attention", job.pattern.attention.is_some()),
        ("[output] tensor_parallel", job.output.tensor_parallel.is_some()),
        ("[output] layout", job.output.layout.is_some_and(|layout| layout != Layout::Masked)),
    ];
    match keys.iter().find(|(_, given)| *given) {
        Some((key, _)) => Err(WidthError::NotStructured { key }),
        None => Ok(()),
    }
}

/// What a structured run leaves, once every layer is committed; `None` for other runs.
fn structured_record(past: &[JournalRecord], job: &JobSpec, outline: &ModelOutline) -> Option<StructuredRecord> {
    let structure = outline.structure.clone()?;
    let kept: BTreeMap<LayerIndex, Kept> = prune_records(past).filter_map(kept_of_layer).collect();
    Some(StructuredRecord { layout: layout_of(job), structure, kept: kept.into_values().collect() })
}

fn kept_of_layer(record: &Record) -> Option<(LayerIndex, Kept)> {
    match record {
        Record::Committed { lease, outcome: Outcome::Pruned { kept: Some(kept), .. } } => match lease.unit {
            Unit::Prune(layer) => Some((layer, kept.clone())),
            Unit::Forward(_) | Unit::Evaluate(_) => None,
        },
        _ => None,
    }
}

fn evaluation_record(record: &JournalRecord, wanted: EvaluatedModel) -> Option<Record> {
    match record {
        JournalRecord::Evaluate { model, record } if *model == wanted => Some(record.clone()),
        _ => None,
    }
}

struct Pruning {
    propagation: Propagation,
    patterns: Vec<Pattern>,
    preparation: Preparation,
}

impl Purpose for Pruning {
    fn record(&self, record: Record) -> JournalRecord {
        JournalRecord::Prune(record)
    }

    fn call(&self, lease: Lease, mut source: Source, keeps_output: bool, help: Help) -> UnitCall {
        match lease.unit {
            Unit::Prune(layer) => {
                if self.propagation == Propagation::Dense {
                    source.replay.clear();
                }
                UnitCall::Prune { source, pattern: self.patterns[layer.0 as usize], keeps_output, help }
            }
            Unit::Forward(_) | Unit::Evaluate(_) => UnitCall::Forward { source },
        }
    }

    fn preparation(&self) -> Option<Preparation> {
        Some(self.preparation.clone())
    }
}
