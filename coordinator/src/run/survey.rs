//! Sparsities by what the dense model is like: look at every layer, and for `measured` try the plans that come of it.
//!
//! The survey is a schedule of its own under a run id of its own. So workers never take its hidden states, which are the dense
//! model's, for those of the pruned one: attaching to the run lets go of everything that belongs to the survey.

use std::sync::Arc;

use espalier_common::ids::{LayerIndex, Lease, RunId, Unit};
use espalier_common::job::{Allocation, JobSpec};
use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::{LayerSurvey, Outcome};
use espalier_common::wire::Source;
use tracing::info;

use super::Run;
use crate::driver::{Driver, Preparation, Purpose};
use crate::error::RunError;
use crate::events::{Phase, RunEvent};
use crate::fleet::{Help, UnitCall};
use crate::journal::JournalRecord;
use crate::plan::{allocate, measured, owl};
use crate::schedule::{Record, Scheduler, Shape};
use crate::trace::UnitSpans;

/// The plans that `measured` tries, first the one that treats all layers alike.
pub(crate) struct Candidates {
    /// γ of each; `None` for the uniform one.
    pub(crate) depth_weights: Vec<Option<f64>>,
    plans: Vec<Vec<Pattern>>,
}

impl Candidates {
    fn new(outline: &ModelOutline, job: &JobSpec, sparsity: f64, surveys: &[LayerSurvey]) -> Self {
        let damage: Vec<Vec<f64>> = surveys.iter().map(measured::damage).collect();
        let depth_weights = candidate_depths(job);
        let plan = |depth: &Option<f64>| match depth {
            None => vec![Pattern::Unstructured { sparsity }; outline.layers.len()],
            Some(depth) => measured::by_damage(outline, &damage, sparsity, job.pattern.spread(), *depth),
        };
        Self { plans: depth_weights.iter().map(plan).collect(), depth_weights }
    }
}

/// γ of each plan that `measured` tries, in the order of their trials; `None` for the uniform one.
pub(crate) fn candidate_depths(job: &JobSpec) -> Vec<Option<f64>> {
    std::iter::once(None).chain(job.pattern.depth_grid().into_iter().map(Some)).collect()
}

impl Run {
    /// One pattern a layer, as the job's allocation wants it.
    ///
    /// # Errors
    /// Those of driving a schedule.
    pub(super) async fn allocate(
        &mut self,
        outline: &ModelOutline,
        pattern: Pattern,
    ) -> Result<Vec<Pattern>, RunError> {
        let (sparsity, spread) = (pattern.sparsity(), self.job.pattern.spread());
        match self.job.pattern.allocation {
            Allocation::Uniform => Ok(vec![pattern; outline.layers.len()]),
            Allocation::Log => Ok(allocate::logarithmic(outline, sparsity, spread)),
            Allocation::Owl => {
                let surveys = self.survey(outline, Vec::new()).await?;
                let outliers: Vec<f64> = surveys.iter().map(|survey| survey.outliers.unwrap_or_default()).collect();
                Ok(owl::by_outliers(outline, &outliers, sparsity, spread))
            }
            Allocation::Measured => {
                let surveys = self.survey(outline, measured::grid(sparsity, spread)).await?;
                let candidates = Candidates::new(outline, &self.job, sparsity, &surveys);
                self.best_of(candidates).await
            }
        }
    }

    /// What every layer of the dense model is like; layers that the journal knows of are not looked at again.
    async fn survey(&mut self, outline: &ModelOutline, sparsities: Vec<f64>) -> Result<Vec<LayerSurvey>, RunError> {
        self.setting.events.note(RunEvent::Phase { phase: Phase::Survey { layers: outline.layers.len() } });
        let shape = Shape::Survey { layer_bytes: outline.layers.iter().map(|layer| layer.bytes).collect() };
        self.drive_survey(shape, "survey", sparsities, Vec::new()).await?;
        let surveyed = |layer| {
            survey_records(&self.past).find_map(|record| match record {
                Record::Committed { lease, outcome: Outcome::Surveyed { survey, .. } }
                    if lease.unit == Unit::Forward(LayerIndex(layer)) =>
                {
                    Some(survey.clone())
                }
                _ => None,
            })
        };
        // Every unit of the schedule is committed, so every layer is there.
        Ok((0..outline.layers.len() as u32).map(|layer| surveyed(layer).unwrap_or_default()).collect())
    }

    /// Tries plans on the sequences kept apart for that, and returns the one that loses least.
    async fn best_of(&mut self, candidates: Candidates) -> Result<Vec<Pattern>, RunError> {
        let Candidates { depth_weights, mut plans } = candidates;
        self.setting.events.note(RunEvent::Phase { phase: Phase::Try { plans: plans.len() } });
        let shape = Shape::Evaluate { first: 0, shares: plans.len() as u32 };
        self.drive_survey(shape, "try", Vec::new(), plans.clone()).await?;
        let losses = trial_losses(&self.past, plans.len());
        let best = measured::best(&losses);
        match depth_weights[best] {
            Some(depth_weight) => info!(depth_weight, loss = losses[best], "allocation found"),
            None => info!(loss = losses[best], "no allocation is better than the same sparsity everywhere"),
        }
        Ok(plans.swap_remove(best))
    }

    async fn drive_survey(
        &mut self,
        shape: Shape,
        stage: &'static str,
        sparsities: Vec<f64>,
        plans: Vec<Vec<Pattern>>,
    ) -> Result<(), RunError> {
        let scheduler = Scheduler::replay(shape, self.setting.limits, survey_records(&self.past));
        let preparation = Preparation {
            job_json: self.job_json(),
            run_url: self.store.url().to_owned(),
            tokens: self.tokens.clone(),
        };
        let purpose = Surveying { sparsities, plans, preparation };
        let id = RunId(format!("{}-survey", self.id));
        let mut journal =
            super::Remembering { journal: &mut self.journal, past: &mut self.past, events: &self.setting.events };
        let mut driver = Driver {
            run: &id,
            roster: &self.setting.roster,
            journal: &mut journal,
            events: &self.setting.events,
            clock: self.setting.clock.as_ref(),
            alike: !self.setting.workers_return,
            stop: &self.setting.stop,
            committed: Default::default(),
            stored: Default::default(),
            store: Arc::clone(&self.store),
            trace: UnitSpans::of_stage(&self.span, stage),
        };
        driver.drive(scheduler, Arc::new(purpose)).await?;
        Ok(())
    }
}

/// The schedule's records of surveys and trials. Their units are of different kinds, so each finds its own.
pub(crate) fn survey_records(past: &[JournalRecord]) -> impl Iterator<Item = &Record> {
    past.iter().filter_map(|record| match record {
        JournalRecord::Survey(record) => Some(record),
        _ => None,
    })
}

/// The loss of each trial, summed over its windows; no number for one that was not made.
pub(crate) fn trial_losses(past: &[JournalRecord], trials: usize) -> Vec<f64> {
    let mut losses = vec![f64::NAN; trials];
    for record in survey_records(past) {
        if let Record::Committed { lease, outcome: Outcome::Evaluated { window_nll, .. } } = record
            && let Unit::Evaluate(trial) = lease.unit
            && let Some(loss) = losses.get_mut(trial as usize)
        {
            *loss = window_nll.iter().sum();
        }
    }
    losses
}

struct Surveying {
    sparsities: Vec<f64>,
    plans: Vec<Vec<Pattern>>,
    preparation: Preparation,
}

impl Purpose for Surveying {
    fn record(&self, record: Record) -> JournalRecord {
        JournalRecord::Survey(record)
    }

    fn call(&self, lease: Lease, source: Source, _: bool, _: Help) -> UnitCall {
        match lease.unit {
            Unit::Forward(_) | Unit::Prune(_) => UnitCall::Survey { source, sparsities: self.sparsities.clone() },
            Unit::Evaluate(trial) => UnitCall::Try { patterns: self.plans[trial as usize].clone() },
        }
    }

    fn preparation(&self) -> Option<Preparation> {
        Some(self.preparation.clone())
    }
}
