//! What follows a failure, by the class of its fault: the one place where it is decided whether, where and when a unit is tried
//! again. Pure, as all of scheduling: time is passed in, and chance comes from the lease, so that a schedule replays.
//!
//! | class | what follows |
//! |---|---|
//! | `RetryHere` | the same worker again after a wait; after so many failures it is given up on for this unit |
//! | `RetryElsewhere` | that worker is given up on for this unit; another has it at once; without another, as `RetryHere` |
//! | `Reject`, `Bug` | the run ends |
//!
//! A unit that three different workers were given up on for is poisoned: the run ends with the last fault. So is one that
//! failed as often as those three could, on however many workers; and the run also ends if nobody is left to give it to.

use std::collections::BTreeMap;
use std::time::Duration;

use espalier_common::clock::Millis;
use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::ids::{Lease, WorkerId};

use super::Limits;

/// The first wait; each further one on the same worker is four times as long.
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// What is to be done with a unit that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is ready again, for whom and when [`Trouble`] lets it be.
    Again,
    /// The run ends with the fault.
    End,
}

/// What went wrong with a unit so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Trouble {
    /// Leases given, in all lives of the run.
    pub(super) leases: u32,
    /// Failures in this life.
    pub(super) failures: u32,
    workers: BTreeMap<WorkerId, Grudge>,
}

/// What a unit has against a worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Grudge {
    failures: u32,
    is_given_up: bool,
    not_before: Millis,
}

impl Trouble {
    /// Takes note of a failure, while the workers `present` are there.
    pub(super) fn note(
        &mut self,
        lease: Lease,
        class: FaultClass,
        now: Millis,
        mut present: impl Iterator<Item = WorkerId>,
        limits: &Limits,
    ) -> Verdict {
        self.failures += 1;
        let grudge = self.workers.entry(lease.worker).or_default();
        grudge.failures += 1;
        grudge.not_before = now.after(wait(lease, grudge.failures));
        let is_exhausted = grudge.failures >= limits.attempts;
        grudge.is_given_up |= is_exhausted || class == FaultClass::RetryElsewhere;
        match class {
            FaultClass::Reject | FaultClass::Bug => Verdict::End,
            FaultClass::RetryHere | FaultClass::RetryElsewhere => {
                let has_elsewhere = present.any(|worker| !self.is_given_up(worker));
                match self.is_poisoned(limits) || (is_exhausted && !has_elsewhere) {
                    true => Verdict::End,
                    false => Verdict::Again,
                }
            }
        }
    }

    /// Whether as many workers were given up on for this unit as may be, or it failed as often as they all may.
    pub(super) fn is_poisoned(&self, limits: &Limits) -> bool {
        let given_up = self.workers.values().filter(|grudge| grudge.is_given_up).count();
        u32::try_from(given_up).unwrap_or(u32::MAX) >= limits.poisoned_on
            || self.failures >= limits.attempts.saturating_mul(limits.poisoned_on)
    }

    /// Whether the unit goes to this worker only if there is nobody else.
    pub(super) fn is_given_up(&self, worker: WorkerId) -> bool {
        self.workers.get(&worker).is_some_and(|grudge| grudge.is_given_up)
    }

    /// Whether the wait after the worker's last failure is over.
    pub(super) fn may_have(&self, worker: WorkerId, now: Millis) -> bool {
        self.workers.get(&worker).is_none_or(|grudge| grudge.not_before <= now)
    }
}

/// How long a worker waits after its `failures`-th failure, the one under `lease`: between half of the step and all of it, by a
/// hash of the lease, so that units which failed together do not come again together.
fn wait(lease: Lease, failures: u32) -> Duration {
    let step = FIRST_WAIT.saturating_mul(4u32.saturating_pow(failures.saturating_sub(1))).min(LONGEST_WAIT);
    let hash = Digest::of(lease.to_string().as_bytes()).to_string();
    let share = u16::from_str_radix(&hash[..4], 16).expect("a digest is written in hexadecimal digits");
    step.mul_f64(0.5 + f64::from(share) / f64::from(u16::MAX) / 2.0)
}

#[cfg(test)]
mod tests {
    use espalier_common::ids::{Attempt, LayerIndex, Unit};

    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);
    const C: WorkerId = WorkerId(3);

    fn lease(worker: WorkerId, attempt: u32) -> Lease {
        Lease { unit: Unit::Prune(LayerIndex(0)), worker, attempt: Attempt(attempt) }
    }

    fn note(trouble: &mut Trouble, worker: WorkerId, class: FaultClass, present: &[WorkerId]) -> Verdict {
        let lease = lease(worker, trouble.failures + 1);
        trouble.note(lease, class, Millis(1000), present.iter().copied(), &Limits::default())
    }

    #[test]
    fn waits_grow_up_to_a_bound_differ_by_lease_and_come_again() {
        let mut last = Duration::ZERO;
        for failures in 1..6 {
            let step = [1, 4, 16, 30, 30][failures as usize - 1];
            let found = wait(lease(A, failures), failures);
            assert!(found >= Duration::from_secs(step) / 2 && found <= Duration::from_secs(step), "{found:?}");
            assert!(found > last || failures > 4);
            last = found;
            assert_eq!(found, wait(lease(A, failures), failures));
        }
        assert_eq!(wait(lease(A, 1), u32::MAX).as_secs() / 16, 1, "no overflow");
        let waits: std::collections::BTreeSet<_> = (1..50).map(|attempt| wait(lease(A, attempt), 1)).collect();
        assert!(waits.len() > 45, "{} different waits", waits.len());
    }

    #[test]
    fn a_passing_fault_waits_on_its_worker_and_then_leaves_it() {
        let mut trouble = Trouble::default();
        for _ in 0..2 {
            assert_eq!(note(&mut trouble, A, FaultClass::RetryHere, &[A, B]), Verdict::Again);
            assert!(!trouble.is_given_up(A) && !trouble.may_have(A, Millis(1000)) && trouble.may_have(B, Millis(1000)));
            assert!(trouble.may_have(A, Millis(1000 + 4000)));
        }
        assert_eq!(note(&mut trouble, A, FaultClass::RetryHere, &[A, B]), Verdict::Again);
        assert!(trouble.is_given_up(A) && !trouble.is_given_up(B));
    }

    #[test]
    fn a_unit_that_three_workers_fail_at_is_poisoned() {
        let mut trouble = Trouble::default();
        let present = [A, B, C, WorkerId(4)];
        assert_eq!(note(&mut trouble, A, FaultClass::RetryElsewhere, &present), Verdict::Again);
        assert_eq!(note(&mut trouble, B, FaultClass::RetryElsewhere, &present), Verdict::Again);
        assert_eq!(note(&mut trouble, C, FaultClass::RetryHere, &present), Verdict::Again);
        assert_eq!(note(&mut trouble, C, FaultClass::RetryElsewhere, &present), Verdict::End);
        assert_eq!(trouble.failures, 4);
    }

    #[test]
    fn a_unit_does_not_go_round_a_large_cluster() {
        let mut trouble = Trouble::default();
        let present: Vec<WorkerId> = (1..100).map(WorkerId).collect();
        let end = present
            .iter()
            .position(|worker| note(&mut trouble, *worker, FaultClass::RetryHere, &present) == Verdict::End);
        assert_eq!((end, trouble.failures), (Some(8), 9));
    }

    #[test]
    fn with_nobody_else_a_worker_has_its_attempts_and_no_more() {
        for class in [FaultClass::RetryHere, FaultClass::RetryElsewhere] {
            let mut trouble = Trouble::default();
            let verdicts: Vec<Verdict> = (0..3).map(|_| note(&mut trouble, A, class, &[A])).collect();
            assert_eq!(verdicts, [Verdict::Again, Verdict::Again, Verdict::End], "{class:?}");
        }
    }

    #[test]
    fn what_nobody_can_do_is_not_tried_again() {
        for class in [FaultClass::Reject, FaultClass::Bug] {
            assert_eq!(note(&mut Trouble::default(), A, class, &[A, B, C]), Verdict::End);
        }
    }
}
