//! How the workers of a chain share its calibration: the owner of a layer lends shares of its input (`layers`), or every worker
//! keeps its share from layer to layer (`data`). Not a bit of the result depends on it. Pure: from an outline, a job and what
//! each strategy is predicted to cost.

use std::fmt;
use std::str::FromStr;

use espalier_common::job::{JobSpec, Propagation};
use espalier_common::outline::ModelOutline;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::cluster::{ClusterSpec, PlannedWorker};
use super::cost;
use super::predict::{PlanError, Prediction, predict};

/// What somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Asked {
    /// [`Strategy::Layers`].
    #[default]
    Layers,
    /// [`Strategy::Data`]; a job that it cannot be used for is refused.
    Data,
    /// Whichever is predicted to cost less.
    Auto,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Layers have owners. In a chain, the owner of the one that is pruned lends shares of its input to the others and gets
    /// their output back.
    Layers,
    /// Every worker keeps its share of the calibration sequences: each layer is pruned by all, and no hidden states travel.
    Data,
}

impl Strategy {
    /// Its name in configurations and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Data => "data",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Asked {
    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::Layers => "layers",
            Self::Data => "data",
            Self::Auto => "auto",
        }
    }
}

/// Not a strategy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("strategy is `{0}`, but must be layers, data or auto")]
pub struct UnknownStrategy(String);

impl FromStr for Asked {
    type Err = UnknownStrategy;

    fn from_str(text: &str) -> Result<Self, UnknownStrategy> {
        let all = [Self::Layers, Self::Data, Self::Auto];
        all.into_iter().find(|asked| asked.name() == text).ok_or_else(|| UnknownStrategy(text.to_owned()))
    }
}

/// A choice, and why it was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// What was asked for.
    pub asked: Asked,
    /// What is done.
    pub strategy: Strategy,
    /// Why, in a line for people.
    pub why: String,
}

impl Choice {
    /// The choice as people are told of it; nothing of the usual.
    pub fn told(&self) -> Option<String> {
        (self.asked != Asked::Layers).then(|| format!("strategy {}: {}", self.strategy, self.why))
    }
}

/// Why a strategy cannot be chosen.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum StrategyError {
    /// The job cannot be done as it was asked for.
    #[error("strategy `data` cannot be used for this job: {reason}; ask for `layers`, or `auto` to have it chosen")]
    Unfit {
        /// Why not.
        reason: &'static str,
    },
    /// See the plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Why `data` cannot be used for a job, if it cannot.
pub fn impediment(outline: &ModelOutline, job: &JobSpec) -> Option<&'static str> {
    if job.propagation.mode == Propagation::Dense {
        return Some(
            "with [propagation] mode = \"dense\" layers do not wait for each other, and each is pruned by one worker",
        );
    }
    (outline.needs_whole || outline.structure.is_some()).then_some(
        "its method needs all sequences of a layer in one place, to choose heads and channels or to tune what it left",
    )
}

/// Chooses between what two strategies are predicted to cost: less time, and where that is the same, fewer bytes moved.
///
/// # Errors
/// `Unfit` if `data` was asked for and cannot be used; `Plan` if the job does not fit the workers.
pub fn choose(
    asked: Asked,
    (outline, job): (&ModelOutline, &JobSpec),
    cluster: &ClusterSpec,
    workers: &[PlannedWorker],
) -> Result<(Choice, Vec<(Strategy, Prediction)>), StrategyError> {
    let impediment = impediment(outline, job);
    if let (Asked::Data, Some(reason)) = (asked, impediment) {
        return Err(StrategyError::Unfit { reason });
    }
    let cost = cost::count(outline, job, cluster.solver);
    let layer_bytes: Vec<u64> = outline.layers.iter().map(|layer| layer.bytes).collect();
    let predicted = |strategy| {
        predict(&cost, (job.propagation.mode, strategy), &layer_bytes, cluster, workers).map(|plan| (strategy, plan))
    };
    let mut plans = vec![predicted(Strategy::Layers)?];
    if impediment.is_none() {
        plans.push(predicted(Strategy::Data)?);
    }
    let chosen = |strategy, why: String| Choice { asked, strategy, why };
    let choice = match (asked, &plans[..]) {
        (Asked::Layers, _) => chosen(Strategy::Layers, "as configured".to_owned()),
        (Asked::Data, _) => chosen(Strategy::Data, "as configured".to_owned()),
        (Asked::Auto, [(_, layers), (_, data)]) => {
            let is_slower = data.seconds > layers.seconds * (1.0 + 1e-9);
            let is_faster = data.seconds < layers.seconds * (1.0 - 1e-9);
            if is_slower || (!is_faster && data.bytes_moved >= layers.bytes_moved) {
                let why = format!("predicted to take {}; with data {}", costs(layers), costs(data));
                chosen(Strategy::Layers, why)
            } else {
                let why = format!("predicted to take {}; with layers {}", costs(data), costs(layers));
                chosen(Strategy::Data, why)
            }
        }
        (Asked::Auto, _) => {
            let reason = impediment.unwrap_or_default();
            chosen(Strategy::Layers, format!("data cannot be used: {reason}"))
        }
    };
    Ok((choice, plans))
}

fn costs(plan: &Prediction) -> String {
    let hidden = plan.workers.iter().map(|part| part.memory.activation_bytes).max().unwrap_or(0);
    format!(
        "{:.1} s, {:.2} GB moved and {:.2} GB of hidden states at one worker",
        plan.seconds,
        plan.bytes_moved as f64 / 1e9,
        hidden as f64 / 1e9
    )
}

#[cfg(test)]
mod tests {
    use super::super::cost::tests::{job, outline};
    use super::*;

    fn workers(count: usize) -> Vec<PlannedWorker> {
        let worker = |index| PlannedWorker { name: format!("w{index}"), memory_bytes: u64::MAX, gflops: 1.0 };
        (0..count).map(worker).collect()
    }

    fn chosen(asked: Asked, mode: &str, count: usize) -> Result<Choice, StrategyError> {
        choose(asked, (&outline(6), &job(mode)), &ClusterSpec::usual(), &workers(count)).map(|(choice, _)| choice)
    }

    #[test]
    fn auto_takes_what_costs_less_and_says_why() {
        let three = chosen(Asked::Auto, "pruned", 3).unwrap();
        assert_eq!(three.strategy, Strategy::Data);
        assert!(three.why.contains("with layers"), "{}", three.why);
        // Nobody to share with: nothing moves either way, and nothing is gained.
        assert_eq!(chosen(Asked::Auto, "pruned", 1).unwrap().strategy, Strategy::Layers);
        let dense = chosen(Asked::Auto, "dense", 3).unwrap();
        assert_eq!(dense.strategy, Strategy::Layers);
        assert!(dense.why.contains("data cannot be used") && dense.why.contains("dense"), "{}", dense.why);
    }

    #[test]
    fn what_is_asked_for_is_done_or_refused() {
        for (asked, strategy) in [(Asked::Layers, Strategy::Layers), (Asked::Data, Strategy::Data)] {
            assert_eq!(chosen(asked, "pruned", 2).unwrap().strategy, strategy);
        }
        assert!(matches!(chosen(Asked::Data, "dense", 2), Err(StrategyError::Unfit { .. })));
        let whole = ModelOutline { needs_whole: true, ..outline(2) };
        let refused = choose(Asked::Data, (&whole, &job("pruned")), &ClusterSpec::usual(), &workers(2)).unwrap_err();
        assert!(refused.to_string().contains("in one place"), "{refused}");
        let (auto, plans) = choose(Asked::Auto, (&whole, &job("pruned")), &ClusterSpec::usual(), &workers(2)).unwrap();
        assert_eq!((auto.strategy, plans.len()), (Strategy::Layers, 1));
    }

    #[test]
    fn with_data_nothing_moves_and_each_worker_keeps_its_share() {
        let (_, plans) =
            choose(Asked::Auto, (&outline(6), &job("pruned")), &ClusterSpec::usual(), &workers(2)).unwrap();
        let [(_, layers), (_, data)] = &plans[..] else { panic!("{plans:?}") };
        assert!(data.seconds < layers.seconds && data.bytes_moved < layers.bytes_moved);
        let hidden = |plan: &Prediction| plan.workers[0].memory.activation_bytes;
        assert!(hidden(data) < hidden(layers));
        assert!(data.workers[1].memory.weights_bytes > 0);
    }

    #[test]
    fn names_are_read_back() {
        for asked in [Asked::Layers, Asked::Data, Asked::Auto] {
            assert_eq!(asked.name().parse(), Ok(asked));
        }
        assert!("Data".parse::<Asked>().unwrap_err().to_string().contains("layers, data or auto"));
    }
}
