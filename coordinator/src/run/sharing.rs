//! What the workers of a run compute with, and how they share its calibration: settled before anything is computed.

use espalier_common::outline::ModelOutline;

use super::Run;
use crate::error::RunError;
use crate::events::RunEvent;
use crate::fleet::Alike;
use crate::journal::JournalRecord;
use crate::plan::cluster::{ClusterSpec, PlannedWorker};
use crate::plan::strategy::{self, Asked, Choice};

impl Run {
    /// As long as the result is there, no worker is taken that could round otherwise than those that began the run.
    ///
    /// # Errors
    /// `InstructionSet` if those that are there could; `Journal`.
    pub(super) fn keep_alike(&mut self) -> Result<Option<Alike>, RunError> {
        let frozen = self.past.iter().find_map(|record| match record {
            JournalRecord::Computing { instruction_set } => Some(instruction_set.clone()),
            _ => None,
        });
        match self.setting.roster.keep_alike(frozen.as_deref()) {
            Err(found) => Err(RunError::InstructionSet { frozen: frozen.unwrap_or_default(), found }),
            Ok(None) => Ok(None),
            Ok(Some((instruction_set, alike))) => {
                if frozen.is_none() {
                    self.append(JournalRecord::Computing { instruction_set })?;
                }
                Ok(Some(alike))
            }
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
