//! Blocks of a group that wait to be solved, and those that are.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::prune::{Problem, RowBlock, Solution, SolveError};

/// One block of one member of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Task {
    pub(super) member: usize,
    pub(super) block: RowBlock,
}

/// What is to be done, and what is done. The owner takes from the front, assistants get from the back; what is largest lies at both
/// ends, so that what is left when all are nearly through is small.
pub(super) struct Board {
    tasks: Vec<Task>,
    state: Mutex<State>,
}

struct State {
    waiting: VecDeque<usize>,
    /// Tasks that the owner is at.
    own: usize,
    own_rows: usize,
    own_seconds: f64,
    solved: Vec<Option<(Solution, f64)>>,
    failed: Option<(usize, SolveError)>,
}

impl Board {
    pub(super) fn new(tasks: Vec<Task>) -> Self {
        let rows: Vec<usize> = tasks.iter().map(|task| task.block.rows).collect();
        let state = State {
            waiting: largest_outside(&rows).into(),
            own: 0,
            own_rows: 0,
            own_seconds: 0.0,
            solved: tasks.iter().map(|_| None).collect(),
            failed: None,
        };
        Self { tasks, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change is whole before anything in it can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn task(&self, index: usize) -> Task {
        self.tasks[index]
    }

    /// Solves waiting tasks one after another until there are none.
    pub(super) fn work(&self, solve: impl Fn(Task) -> Result<(Solution, f64), SolveError>) {
        while let Some(index) = self.take_first() {
            let task = self.tasks[index];
            let result = solve(task);
            let mut state = self.state();
            state.own -= 1;
            match result {
                Ok((solution, seconds)) => {
                    state.own_rows += task.block.rows;
                    state.own_seconds += seconds;
                    state.solved[index] = Some((solution, seconds));
                }
                Err(error) => {
                    state.waiting.clear();
                    state.failed.get_or_insert((task.member, error));
                }
            }
        }
    }

    fn take_first(&self) -> Option<usize> {
        let mut state = self.state();
        let index = state.waiting.pop_front()?;
        state.own += 1;
        Some(index)
    }

    /// At most `most` tasks for an assistant, where `hands` take part: no more than its share of what waits; and the last ones only
    /// if it `is_idle` and the owner is not, or the owner would wait for what it could have done itself.
    pub(super) fn take_last(&self, most: usize, hands: usize, is_idle: bool) -> Vec<usize> {
        let mut state = self.state();
        let fair = (state.waiting.len() / hands.max(1)).max(usize::from(is_idle && state.own > 0));
        let first = state.waiting.len().saturating_sub(most.min(fair));
        state.waiting.split_off(first).into()
    }

    /// Takes back what an assistant did not do.
    pub(super) fn give_back(&self, tasks: &[usize]) {
        let mut state = self.state();
        if state.failed.is_none() {
            state.waiting.extend(tasks);
        }
    }

    /// Keeps what an assistant did.
    pub(super) fn put(&self, index: usize, solution: Solution, seconds: f64) {
        self.state().solved[index] = Some((solution, seconds));
    }

    pub(super) fn has_waiting(&self) -> bool {
        !self.state().waiting.is_empty()
    }

    /// Whether the owner has nothing more to do.
    pub(super) fn is_owner_idle(&self) -> bool {
        let state = self.state();
        state.own == 0 && state.waiting.is_empty()
    }

    /// Seconds that the owner takes for so many rows, by what it did so far.
    pub(super) fn own_seconds(&self, rows: usize) -> f64 {
        let state = self.state();
        if state.own_rows == 0 { 0.0 } else { state.own_seconds / state.own_rows as f64 * rows as f64 }
    }

    /// The solution of each member, and the seconds spent on it, once all is done.
    ///
    /// # Errors
    /// The member that failed first, and why.
    pub(super) fn finish(self, members: usize) -> Result<Vec<(Solution, f64)>, (usize, SolveError)> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(failed) = state.failed {
            return Err(failed);
        }
        let mut parts: Vec<(Vec<Solution>, f64)> = (0..members).map(|_| (Vec::new(), 0.0)).collect();
        for (task, solved) in self.tasks.iter().zip(state.solved) {
            let (solution, seconds) = solved.expect("nobody is at a task any more, and none waits");
            parts[task.member].0.push(solution);
            parts[task.member].1 += seconds;
        }
        let joined = |(member, (solutions, seconds))| {
            Solution::joined(solutions).map(|solution| (solution, seconds)).map_err(|error| (member, error))
        };
        parts.into_iter().enumerate().map(joined).collect()
    }
}

/// An order of things of these sizes: of each size one half in front and one behind, the largest at both ends.
pub(super) fn largest_outside(sizes: &[usize]) -> Vec<usize> {
    let kinds: BTreeSet<usize> = sizes.iter().copied().collect();
    let (mut front, mut behind) = (Vec::new(), Vec::new());
    for kind in kinds.into_iter().rev() {
        let alike: Vec<usize> = (0..sizes.len()).filter(|&index| sizes[index] == kind).collect();
        let (first, last) = alike.split_at(alike.len().div_ceil(2));
        front.extend(first);
        behind.push(last.to_vec());
    }
    front.extend(behind.into_iter().rev().flatten());
    front
}

/// The rows that the solution of a block is of, and what it must be like to be believed; what it is worth is for `verify`.
pub(super) fn is_plausible(problem: &Problem<'_>, block: &RowBlock, rows: &[f32]) -> bool {
    let zeros = rows.iter().filter(|value| **value == 0.0).count();
    let range: Range<usize> = block.first..block.first + block.rows;
    problem.weight.dim(0).is_ok_and(|all| range.end <= all)
        && zeros >= block.zeros
        && rows.iter().all(|value| value.is_finite())
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;

    fn tasks(rows: &[usize]) -> Vec<Task> {
        let task =
            |(member, rows): (usize, &usize)| Task { member, block: RowBlock { first: 0, rows: *rows, zeros: 0 } };
        rows.iter().enumerate().map(task).collect()
    }

    fn solution(rows: usize) -> Solution {
        let weight = Tensor::zeros((rows, 3), DType::F32, &Device::Cpu).unwrap();
        Solution { weight, iterations: 1, damping: 0.0, damping_raised: 0, dead_channels: 0, alpha: None, flops: 1.0 }
    }

    #[test]
    fn the_largest_are_taken_first_from_both_ends() {
        assert_eq!(largest_outside(&[144, 144, 144, 144, 96, 96, 96, 96]), [0, 1, 4, 5, 6, 7, 2, 3]);
        assert_eq!(largest_outside(&[5, 5, 5]), [0, 1, 2]);
        assert_eq!(largest_outside(&[1, 2, 3, 4]), [3, 2, 1, 0]);
        let board = Board::new(tasks(&[1, 9, 9]));
        assert_eq!(board.take_last(1, 1, true), [2]);
        assert_eq!(board.take_first(), Some(1));
    }

    #[test]
    fn the_last_task_is_left_to_whoever_is_through_first() {
        let board = Board::new(tasks(&[3, 3, 3, 3]));
        assert_eq!((board.take_last(1, 2, true), board.take_last(1, 2, false)), (vec![3], vec![2]));
        assert_eq!(board.take_first(), Some(0));
        // The assistant has another one; it gets the last once it has none, as long as the owner is busy.
        assert!(board.take_last(1, 2, false).is_empty());
        assert_eq!(board.take_last(1, 2, true), [1]);
        let idle = Board::new(tasks(&[3]));
        assert!(idle.take_last(1, 2, true).is_empty(), "the owner has nothing to do but this");
    }

    #[test]
    fn what_an_assistant_does_not_do_is_done_by_the_owner() {
        let board = Board::new(tasks(&[3, 3, 3, 3]));
        let lent = board.take_last(9, 2, true);
        assert_eq!(lent, [2, 3]);
        board.put(3, solution(3), 0.5);
        board.work(|task| Ok((solution(task.block.rows), 1.0)));
        assert!(board.is_owner_idle());
        board.give_back(&lent[..1]);
        assert!(board.has_waiting() && !board.is_owner_idle());
        board.work(|task| Ok((solution(task.block.rows), 1.0)));
        assert!((board.own_seconds(12) - 4.0).abs() < 1e-9);
        let rows: Vec<usize> = board.finish(4).unwrap().iter().map(|(s, _)| s.weight.dim(0).unwrap()).collect();
        assert_eq!(rows, [3; 4]);
    }

    #[test]
    fn a_failure_ends_the_work_and_is_told() {
        let board = Board::new(tasks(&[1, 1, 1]));
        let lent = board.take_last(1, 2, true);
        board.work(|task| if task.member == 0 { Err(SolveError::Cancelled) } else { Ok((solution(1), 1.0)) });
        board.give_back(&lent);
        assert!(!board.has_waiting());
        assert!(matches!(board.finish(3), Err((0, SolveError::Cancelled))));
    }
}
