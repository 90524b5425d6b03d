//! What the workers of a run compute with, and how they share its calibration: settled before anything is computed.

use espalier_common::outline::ModelOutline;

use super::{Run, wait_for_workers};
use crate::error::RunError;
use crate::events::RunEvent;
use crate::fleet::Pinned;
use crate::journal::JournalRecord;
use crate::plan::cluster::{ClusterSpec, PlannedWorker};
use crate::plan::strategy::{self, Asked, Choice};

impl Run {
    /// Waits for workers. As long as the result is there, none is taken that could round otherwise than those that began the run;
    /// once the run is over, nothing is computed and anybody will do.
    ///
    /// # Errors
    /// `InstructionSet` if those that are there could; `Journal`; see [`wait_for_workers`].
    pub(super) async fn gather_workers(&mut self) -> Result<Option<Pinned>, RunError> {
        if self.past.iter().any(|record| matches!(record, JournalRecord::Finished { .. })) {
            wait_for_workers(&self.setting).await?;
            return Ok(None);
        }
        let frozen = self.past.iter().find_map(|record| match record {
            JournalRecord::Computing { instruction_set } => Some(instruction_set.clone()),
            _ => None,
        });
        let Some(frozen) = frozen else {
            wait_for_workers(&self.setting).await?;
            let instruction_set = self.setting.roster.instruction_set().ok_or(RunError::WorkerDiedEarly)?;
            let pinned = self.pin(&instruction_set)?;
            self.append(JournalRecord::Computing { instruction_set })?;
            return Ok(Some(pinned));
        };
        if !self.setting.workers_return {
            wait_for_workers(&self.setting).await?;
            return self.pin(&frozen).map(Some);
        }
        // Others may follow: the wrong ones are turned away, those that were quicker too, while the right ones are waited for.
        let (pinned, others) = self.setting.roster.pin(&frozen);
        for (worker, found) in others {
            tracing::warn!(%worker, %frozen, %found, "turned away: results could differ in the last bit");
            self.setting.roster.remove(worker).await;
        }
        wait_for_workers(&self.setting).await?;
        Ok(Some(pinned))
    }

    fn pin(&self, frozen: &str) -> Result<Pinned, RunError> {
        let (pinned, others) = self.setting.roster.pin(frozen);
        match others.into_values().next() {
            Some(found) => Err(RunError::InstructionSet { frozen: frozen.to_owned(), found }),
            None => Ok(pinned),
        }
    }

    /// The strategy that was chosen last, in this life of the run or an earlier one.
    pub(super) fn chosen_strategy(&self) -> Option<&Choice> {
        self.past.iter().rev().find_map(|record| match record {
            JournalRecord::Strategy(choice) => Some(choice),
            _ => None,
        })
    }

    /// Chooses the strategy, by the workers that are there.
    ///
    /// # Errors
    /// `Strategy` if `data` is asked for and the job does not allow it.
    pub(super) fn choose_strategy(&mut self, outline: &ModelOutline) -> Result<(), RunError> {
        // Whether it fits their memory is for them to say; and what is between them nobody has told.
        let worker =
            |name: String, gflops: f64| PlannedWorker { name, memory_bytes: u64::MAX, gflops: gflops.max(1.0) };
        let members = self.setting.roster.members().into_values();
        let workers: Vec<PlannedWorker> =
            members.map(|member| worker(member.offer.name.clone(), member.offer.gflops)).collect();
        let asked = self.asked_strategy();
        let (choice, _) = strategy::choose(asked, (outline, &self.job), &ClusterSpec::usual(), &workers)?;
        self.setting.events.note(RunEvent::Strategy(choice.clone()));
        if self.chosen_strategy() != Some(&choice) {
            self.append(JournalRecord::Strategy(choice))?;
        }
        Ok(())
    }

    /// What is asked for now; where nothing is, what the run was begun with.
    fn asked_strategy(&self) -> Asked {
        let now = self.setting.strategy;
        now.or_else(|| self.chosen_strategy().map(|choice| choice.asked)).unwrap_or_default()
    }
}
