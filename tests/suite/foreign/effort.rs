//! How hard a reader is tried: so many inputs with every `make test`, or for as long as `make fuzz` says.

use espalier_common::clock::Stopwatch;
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::watch::reading;

/// Inputs between two looks at the clock.
const BATCH: u32 = 200;

/// How hard a reader is tried.
#[derive(Debug, Clone)]
pub(crate) enum Effort {
    /// A fixed number of inputs, other ones every time.
    Some,
    /// As many as there is time for.
    For {
        /// Seconds, shared out evenly if a target has several readers.
        seconds: f64,
        /// What the inputs are drawn from.
        seed: u64,
    },
}

impl Effort {
    /// What a target may take that has so many parts.
    pub(super) fn split(&self, parts: u32) -> Self {
        match self {
            Self::Some => Self::Some,
            Self::For { seconds, seed } => Self::For { seconds: seconds / f64::from(parts), seed: *seed },
        }
    }

    /// Tries a reader with what a strategy draws: `cases` inputs, or as many as there is time for. Returns how many.
    pub(super) fn check<S: Strategy>(
        &self,
        cases: u32,
        strategy: S,
        test: impl Fn(S::Value) -> Result<(), TestCaseError>,
    ) -> u64
    where
        S::Value: std::fmt::Debug,
    {
        let config = |cases| ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
        match self {
            Self::Some => {
                TestRunner::new(config(cases)).run(&strategy, test).unwrap_or_else(|error| panic!("{error}"));
                cases.into()
            }
            Self::For { seconds, seed } => {
                let (watch, mut done) = (Stopwatch::start(), 0_u64);
                while watch.seconds() < *seconds {
                    let drawn_from = format!("SEED={seed}, inputs from {done}");
                    reading(drawn_from.clone());
                    let mut bytes = [0; 32];
                    bytes[..8].copy_from_slice(&seed.to_le_bytes());
                    bytes[8..16].copy_from_slice(&done.to_le_bytes());
                    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
                    let mut runner = TestRunner::new_with_rng(config(BATCH), rng);
                    runner.run(&strategy, &test).unwrap_or_else(|error| panic!("{drawn_from}: {error}"));
                    done += u64::from(BATCH);
                }
                done
            }
        }
    }
}
