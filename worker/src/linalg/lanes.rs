//! Plain loops, compiled for the widest vectors that the machine has.

use pulp::{Arch, Simd, WithSimd};

/// Work whose body is inlined into a copy of itself for each vector width. A closure handed to `Arch::dispatch` may be left out
/// of line when it is long, and is then compiled for the narrowest vectors.
pub(crate) trait Lanes {
    /// What the work gives.
    type Output;
    /// Does it; `#[inline(always)]`, and so is all it calls.
    fn run(self) -> Self::Output;
}

struct Widened<W>(W);

impl<W: Lanes> WithSimd for Widened<W> {
    type Output = W::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> W::Output {
        self.0.run()
    }
}

/// Runs the copy of `work` for this machine.
pub(crate) fn in_lanes<W: Lanes>(work: W) -> W::Output {
    Arch::new().dispatch(Widened(work))
}
