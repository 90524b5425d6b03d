//! Orders to solve: what an assistant is asked for, and whether what it sends is that.

use std::collections::VecDeque;

use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::board::{Board, Task, is_plausible};
use crate::linalg::matrix;
use crate::prune::{Problem, Solution};
use crate::transport::parcel::numbers;

/// Blocks that an assistant was asked for.
pub(super) struct Order {
    /// Whom, as the owner numbers them.
    pub(super) assistant: usize,
    /// The order's number.
    pub(super) number: u32,
    /// The blocks, as the board numbers them.
    pub(super) tasks: Vec<usize>,
}

/// A block as it is asked for.
pub(super) fn asked(Task { member, block }: Task) -> pb::Block {
    pb::Block {
        member: member as u32,
        first_row: block.first as u32,
        rows: block.rows as u32,
        zeros: block.zeros as u64,
    }
}

/// Keeps the blocks of an order that was done; false if they are not what was asked for.
pub(super) fn take_solved(
    problems: &[Problem<'_>],
    board: &Board,
    orders: &mut VecDeque<Order>,
    (number, matter, body): (usize, &Matter, &[u8]),
) -> bool {
    let Matter::Solved(solved) = matter else { return false };
    let Some(place) = orders.iter().position(|order| order.assistant == number && order.number == solved.order) else {
        return false;
    };
    let tasks = &orders[place].tasks;
    let are_those = tasks.iter().map(|&task| Some(asked(board.task(task))));
    if !are_those.eq(solved.blocks.iter().map(|solved| solved.block)) {
        return false;
    }
    let mut rest = body;
    let mut done = Vec::new();
    for (&index, told) in tasks.iter().zip(&solved.blocks) {
        let Task { member, block } = board.task(index);
        let problem = &problems[member];
        let Ok(columns) = problem.weight.dim(1) else { return false };
        let (rows, others) = rest.split_at(block.rows * columns * size_of::<f32>());
        rest = others;
        let rows = numbers::<f32>(rows).into_owned();
        if !is_plausible(problem, &block, &rows) {
            return false;
        }
        let Ok(weight) = matrix(rows, columns, problem.weight.device()) else { return false };
        let solution = Solution {
            weight,
            iterations: told.iterations,
            damping: told.damping,
            damping_raised: told.damping_raised,
            dead_channels: told.dead_channels,
            alpha: told.alpha,
            flops: told.flops,
        };
        done.push((index, solution, told.seconds));
    }
    orders.remove(place);
    done.into_iter().for_each(|(index, solution, seconds)| board.put(index, solution, seconds));
    true
}
