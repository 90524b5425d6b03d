//! The owner's side of solving a group: blocks are lent out, and what comes back is taken.

use std::collections::VecDeque;
use std::time::Duration;

use candle_core::Device;
use espalier_common::clock::Stopwatch;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::board::{Board, Task};
use super::groundwork::Laying;
use super::order::{Order, asked, take_solved};
use super::owner::{Crew, GLANCE, PATIENCE};
use crate::device::in_order;
use crate::prune::{GroupSolver, Problem, RowBlock, Solution, SolveCtx, SolveError};
use crate::transport::Outgoing;

/// Orders to solve that an assistant has at a time: one that it is at, and one on its way.
const ORDERS: usize = 2;
/// How long an owner that will soon be through looks for answers at a time, if it has other things to do then.
const SHORT_GLANCE: Duration = Duration::from_millis(2);

impl Crew<'_> {
    /// Solves the sublayers of a group, block by block: the owner from the first on, assistants from the last. Returns each
    /// solution with the seconds that were spent on it, whoever spent them.
    ///
    /// # Errors
    /// The member that failed, and why.
    pub(crate) fn solve(
        &mut self,
        group: usize,
        (solver, laying): (&dyn GroupSolver, Option<Laying>),
        (problems, cut): (&[Problem<'_>], Vec<Vec<RowBlock>>),
        ctx: &SolveCtx,
    ) -> Result<Vec<(Solution, f64)>, (usize, SolveError)> {
        let device = solver.device();
        let is_shared = self.statistics_of == Some(group);
        let solve = |task: Task| {
            let watch = Stopwatch::start();
            let solved = problems[task.member]
                .solve_rows(&task.block, |problem, zeros| solver.solve_block(problem, zeros, ctx))?;
            Ok((solved, watch.seconds()))
        };
        // Assistants make parts of the groundwork while zeros are dealt out here.
        let cut: Vec<_> = cut.into_iter().enumerate().collect();
        let deal = |(member, mut blocks): (usize, Vec<RowBlock>)| match solver.deal(&problems[member], &mut blocks) {
            Ok(()) => Ok(blocks.into_iter().map(move |block| Task { member, block })),
            Err(error) => Err((member, error)),
        };
        let watch = Stopwatch::start();
        let board = Board::new(in_order(device.unwrap_or(&Device::Cpu), cut, deal)?.into_iter().flatten().collect());
        tracing::debug!(group, seconds = watch.seconds(), "zeros are dealt out");
        let common = laying.map(|laying| self.lay(laying)).transpose();
        let common = common.map_err(|error| (0, error))?.unwrap_or_default();
        if device.is_some() {
            board.work(solve);
        }
        while board.has_waiting() {
            rayon::in_place_scope(|scope| {
                for _ in 0..rayon::current_num_threads() {
                    scope.spawn(|_| board.work(solve));
                }
                if is_shared { self.lend(group, problems, &board) } else { Ok(()) }
            })
            .map_err(|error| (0, error))?;
        }
        let mut solved = board.finish(problems.len())?;
        solved.iter_mut().take(1).for_each(|(first, _)| first.flops += common);
        Ok(solved)
    }

    /// Gives out blocks to assistants until none waits, and takes what they make of them.
    fn lend(&mut self, group: usize, problems: &[Problem<'_>], board: &Board) -> Result<(), SolveError> {
        let mut orders: VecDeque<Order> = VecDeque::new();
        let (mut idle, mut counted): (Option<Stopwatch>, f64) = (None, 0.0);
        loop {
            for _ in 0..ORDERS {
                (0..self.assistants.len()).for_each(|number| self.order(number, group, board, &mut orders));
            }
            if orders.is_empty() {
                self.waiting.add(idle.map_or(0.0, |idle| idle.seconds() - counted), 0.0);
                return Ok(());
            }
            // Who has nothing to solve any more measures what was solved before.
            let measures = self.has_own_tiles() && board.is_owner_idle();
            let wait = match self.has_own_tiles() && !board.has_waiting() {
                true if measures => Duration::ZERO,
                true => SHORT_GLANCE,
                false => GLANCE,
            };
            let letter = self.next_letter(wait).map_err(|_| SolveError::Cancelled)?;
            self.place.received(letter.as_ref().map_or(0, |(_, _, body)| body.len() as u64));
            let none_came = letter.is_none();
            if let Some(idle) = idle.as_ref().filter(|_| !none_came) {
                self.waiting.add(idle.seconds() - counted, self.on_its_way);
                counted = idle.seconds();
            }
            if let Some((number, matter, body)) = letter
                && !take_solved(problems, board, &mut orders, (number, &matter, &body))
            {
                self.lose(number, "it gave something else than what was asked for");
            }
            self.place.control.check_cancelled().map_err(|_| SolveError::Cancelled)?;
            if board.is_owner_idle() {
                let watch = idle.get_or_insert_with(Stopwatch::start);
                let rows = |order: &Order| order.tasks.iter().map(|&task| board.task(task).block.rows).sum::<usize>();
                let most = orders.iter().map(rows).max().unwrap_or(0) * ORDERS;
                if watch.seconds() > self.place.patience.as_secs_f64() + PATIENCE * board.own_seconds(most) {
                    let late: Vec<usize> = orders.iter().map(|order| order.assistant).collect();
                    late.into_iter().for_each(|number| self.lose(number, "it is too slow"));
                } else if measures && none_came {
                    let piece = Stopwatch::start();
                    self.measure_some()?;
                    counted += piece.seconds();
                }
            }
            orders.retain(|order| {
                let stays = self.is_there(order.assistant);
                if !stays {
                    board.give_back(&order.tasks);
                }
                stays
            });
        }
    }

    /// Asks an assistant for some blocks, if it has too few to do and blocks wait.
    fn order(&mut self, number: usize, group: usize, board: &Board, orders: &mut VecDeque<Order>) {
        let under_way = orders.iter().filter(|order| order.assistant == number).count();
        if !self.is_there(number) || under_way >= ORDERS {
            return;
        }
        let tasks =
            board.take_last(self.assistants[number].threads.unwrap_or(1), 1 + self.assistants.len(), under_way == 0);
        if tasks.is_empty() {
            return;
        }
        self.next_order += 1;
        let blocks = tasks.iter().map(|&task| asked(board.task(task))).collect();
        let solve = pb::Solve {
            order: self.next_order,
            group: group as u32,
            pattern_json: serde_json::to_string(&self.pattern).expect("a pattern is plain data"),
            blocks,
        };
        orders.push_back(Order { assistant: number, number: self.next_order, tasks });
        self.send(number, Outgoing::of(Matter::Solve(solve)));
    }
}
