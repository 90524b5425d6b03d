//! The strategy `data`: who keeps which share of the calibration sequences, from layer to layer.
//!
//! Shares are runs of leaves in the order of their workers, cut evenly. They are cut anew when somebody who had one is gone, and
//! when others have come and it pays: whoever has leaves that it did not keep must make them again, through all layers since the
//! tokens or what is stored. What is kept is the workers' to know; nothing but time depends on who has what.

use std::ops::Range;

use espalier_common::calibration::LEAVES;
use espalier_common::ids::WorkerId;

/// The shares of one run, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Shares {
    cut: Vec<(WorkerId, Range<usize>)>,
}

impl Shares {
    /// Cuts the leaves for a layer that `owner` prunes with the help of `others`, unless they stay as they are. A share that was
    /// not kept has to run through `behind` layers; `left` are to be pruned yet, this one among them. At most `most` have one.
    pub(super) fn settle(&mut self, owner: WorkerId, others: &[WorkerId], most: usize, (behind, left): (usize, usize)) {
        let mut order: Vec<WorkerId> = self.cut.iter().map(|(worker, _)| *worker).collect();
        let had = order.len();
        order.retain(|worker| *worker == owner || others.contains(worker));
        let must = had == 0 || order.len() < had || !order.contains(&owner);
        let new: Vec<WorkerId> = others.iter().copied().filter(|worker| !order.contains(worker)).collect();
        // With one hand more, each layer that is left takes 1 / (had · (had + 1)) of a pass less; making the new shares takes
        // behind / (had + 1) of one.
        let pays = !new.is_empty() && had < most && left > behind * had;
        if !must && !pays {
            return;
        }
        let owner_comes = !order.contains(&owner);
        if owner_comes {
            order.truncate(most.max(1) - 1);
        }
        let room = most.max(1) - order.len();
        // Sequences that are held out are among the last leaves, and sums over them are a second set, which need not travel if the
        // owner has them.
        let others = new.into_iter().filter(|worker| *worker != owner).take(room - usize::from(owner_comes));
        let coming: Vec<WorkerId> = others.chain(owner_comes.then_some(owner)).collect();
        let among = |place: usize| [&order[..place], &coming, &order[place..]].concat();
        let cuts = (0..=order.len()).map(|place| cut(&among(place)));
        if let Some(best) = cuts.max_by_key(|cut| self.kept_by(cut)) {
            self.cut = best;
        }
    }

    /// Leaves that stay where they are if they are cut so.
    fn kept_by(&self, cut: &[(WorkerId, Range<usize>)]) -> usize {
        let kept = |(worker, leaves): &(WorkerId, Range<usize>)| {
            let had = self.of(*worker);
            had.end.min(leaves.end).saturating_sub(had.start.max(leaves.start))
        };
        cut.iter().map(kept).sum()
    }

    /// A worker's leaves; none if it has no share.
    pub(super) fn of(&self, worker: WorkerId) -> Range<usize> {
        let found = self.cut.iter().find(|(other, _)| *other == worker);
        found.map_or(LEAVES..LEAVES, |(_, leaves)| leaves.clone())
    }

    /// Who has a share.
    pub(super) fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.cut.iter().map(|(worker, _)| *worker)
    }

    /// Whether every leaf is somebody's, and none two's; or nothing has been cut.
    pub(super) fn are_whole(&self) -> bool {
        let mut next = 0;
        let follow = self.cut.iter().all(|(_, leaves)| {
            let follows = leaves.start == next && !leaves.is_empty();
            next = leaves.end;
            follows
        });
        self.cut.is_empty() || (follow && next == LEAVES)
    }
}

/// All leaves, cut evenly for some workers in their order.
fn cut(order: &[WorkerId]) -> Vec<(WorkerId, Range<usize>)> {
    let hands = order.len();
    let leaves_of = |hand: usize| hand * LEAVES / hands..(hand + 1) * LEAVES / hands;
    order.iter().enumerate().map(|(hand, worker)| (*worker, leaves_of(hand))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerId = WorkerId(1);
    const B: WorkerId = WorkerId(2);
    const C: WorkerId = WorkerId(3);
    const D: WorkerId = WorkerId(4);

    #[test]
    fn shares_stay_while_nobody_goes_and_nobody_comes() {
        let mut shares = Shares::default();
        shares.settle(A, &[B, C], LEAVES, (0, 9));
        let first = shares.clone();
        assert_eq!([shares.of(B), shares.of(C), shares.of(A)], [0..2, 2..5, 5..8], "the owner has the last ones");
        shares.settle(A, &[B, C], LEAVES, (1, 8));
        assert_eq!(shares, first);
        // Another owner is none of the shares' business.
        shares.settle(C, &[A, B], LEAVES, (1, 8));
        assert_eq!(shares, first);
        assert!(shares.are_whole());
    }

    #[test]
    fn who_is_gone_leaves_its_share_to_the_others_in_their_order() {
        let mut shares = Shares::default();
        shares.settle(A, &[B, C], LEAVES, (0, 9));
        shares.settle(A, &[C], LEAVES, (5, 4));
        assert_eq!([shares.of(C), shares.of(B), shares.of(A)], [0..4, 8..8, 4..8]);
        let mut other = shares.clone();
        other.settle(C, &[B], LEAVES, (6, 3));
        assert_eq!([other.of(C), other.of(B)], [0..4, 4..8], "who is there keeps what it has");
        shares.settle(C, &[], LEAVES, (6, 3));
        assert_eq!([shares.of(C), shares.of(A)], [0..8, 8..8]);
        assert!(shares.are_whole());
    }

    #[test]
    fn who_comes_late_gets_a_share_only_if_that_pays() {
        let mut shares = Shares::default();
        shares.settle(A, &[B], LEAVES, (0, 10));
        let before = shares.clone();
        shares.settle(A, &[B, C], LEAVES, (5, 5));
        assert_eq!((&shares, shares.of(C)), (&before, 8..8), "making it takes longer than it saves");
        shares.settle(A, &[B, C], LEAVES, (2, 5));
        assert_eq!([shares.of(B), shares.of(C), shares.of(A)], [0..2, 2..5, 5..8], "nobody else has any to make");
        assert!(shares.are_whole());
    }

    #[test]
    fn an_owner_has_a_share_however_many_are_there() {
        let mut shares = Shares::default();
        shares.settle(C, &[A, B], 2, (0, 3));
        assert_eq!([shares.of(A), shares.of(C), shares.of(B)], [0..4, 4..8, 8..8]);
        shares.settle(D, &[A, B, C], 2, (1, 2));
        assert_eq!([shares.of(A), shares.of(D), shares.of(C)], [0..4, 4..8, 8..8]);
        shares.settle(B, &[A, C, D], 1, (1, 2));
        assert!(shares.of(B) == (0..LEAVES) && shares.are_whole());
    }
}
