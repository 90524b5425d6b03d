//! The two passes around the product of an ADMM step; see `prune/admm.rs` for what they compute.

use candle_core::{CpuStorage, CudaStorage, CustomOp3, InplaceOp3, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::{Place, PlaceMut, values, values_mut};
use crate::device::kernels::{Arg, Call, Launch};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 16;

/// `ρD − ρŴ − Λ`, all `[rows, n]`: `merged` is D where `keep` is 1 and U = Λ/ρ' elsewhere, ρ' being the ρ `before`.
///
/// # Errors
/// What the backend says.
pub fn right_side(merged: &Tensor, keep: &Tensor, anchor: &Tensor, rho: f32, before: f32) -> Result<Tensor> {
    merged.apply_op3_no_bwd(keep, anchor, &Right { rho, before })
}

/// `merged ← σB + merged·(1 − σ)` where `keep` is 1 and `σB + merged·ratio` elsewhere: the next A = B + Λ/ρ.
///
/// # Errors
/// What the backend says.
pub fn update(merged: &Tensor, primal: &Tensor, keep: &Tensor, sigma: f32, ratio: f32) -> Result<()> {
    merged.inplace_op3(primal, keep, &Update { sigma, ratio })
}

struct Right {
    rho: f32,
    before: f32,
}

impl Right {
    fn call<'a, S>(
        &self,
        out: PlaceMut<'a, S>,
        merged: Place<'a, S>,
        keep: Place<'a, S>,
        anchor: Place<'a, S>,
    ) -> Call<'a, S> {
        let elements = merged.1.shape().elem_count();
        Call {
            launch: Launch::over("admm_right", elements),
            args: vec![
                Arg::Write(out.0, out.1),
                Arg::Read(merged.0, merged.1),
                Arg::Read(keep.0, keep.1),
                Arg::Read(anchor.0, anchor.1),
                Arg::Count(elements),
                Arg::Number(self.rho),
                Arg::Number(self.before),
            ],
        }
    }
}

impl CustomOp3 for Right {
    fn name(&self) -> &'static str {
        "admm-right"
    }

    fn cpu_fwd(
        &self,
        merged: &CpuStorage,
        merged_l: &Layout,
        keep: &CpuStorage,
        keep_l: &Layout,
        anchor: &CpuStorage,
        anchor_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let merged = values::<f32>((merged, merged_l))?;
        let (keep, anchor) = (values::<u8>((keep, keep_l))?, values::<f32>((anchor, anchor_l))?);
        let Self { rho, before } = *self;
        let mut right = merged.to_vec();
        let chunks = right.par_chunks_mut(CHUNK).zip(keep.par_chunks(CHUNK)).zip(anchor.par_chunks(CHUNK));
        chunks.for_each(|((right, keep), anchor)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((r, keep), w) in right.iter_mut().zip(keep).zip(anchor) {
                        *r = *r * if *keep == 1 { rho } else { -before } - rho * w;
                    }
                },
            );
        });
        Ok((CpuStorage::F32(right), merged_l.shape().clone()))
    }

    fn cuda_fwd(
        &self,
        merged: &CudaStorage,
        merged_l: &Layout,
        keep: &CudaStorage,
        keep_l: &Layout,
        anchor: &CudaStorage,
        anchor_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let layout = Layout::contiguous(merged_l.shape());
        let mut out = crate::device::kernels::f32_like(merged, layout.shape().elem_count())?;
        self.call((&mut out, &layout), (merged, merged_l), (keep, keep_l), (anchor, anchor_l)).run()?;
        Ok((out, merged_l.shape().clone()))
    }
}

struct Update {
    sigma: f32,
    ratio: f32,
}

impl Update {
    fn call<'a, S>(&self, merged: PlaceMut<'a, S>, primal: Place<'a, S>, keep: Place<'a, S>) -> Call<'a, S> {
        let elements = primal.1.shape().elem_count();
        Call {
            launch: Launch::over("admm_update", elements),
            args: vec![
                Arg::Write(merged.0, merged.1),
                Arg::Read(primal.0, primal.1),
                Arg::Read(keep.0, keep.1),
                Arg::Count(elements),
                Arg::Number(self.sigma),
                Arg::Number(self.ratio),
            ],
        }
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "admm-update"
    }

    fn cpu_fwd(
        &self,
        merged: &mut CpuStorage,
        merged_l: &Layout,
        primal: &CpuStorage,
        primal_l: &Layout,
        keep: &CpuStorage,
        keep_l: &Layout,
    ) -> Result<()> {
        let merged = values_mut((merged, merged_l))?;
        let (primal, keep) = (values::<f32>((primal, primal_l))?, values::<u8>((keep, keep_l))?);
        let Self { sigma, ratio } = *self;
        let chunks = merged.par_chunks_mut(CHUNK).zip(primal.par_chunks(CHUNK)).zip(keep.par_chunks(CHUNK));
        chunks.for_each(|((merged, primal), keep)| {
            Arch::new().dispatch(
                #[inline(always)]
                || {
                    for ((a, b), keep) in merged.iter_mut().zip(primal).zip(keep) {
                        *a = sigma * b + *a * if *keep == 1 { 1.0 - sigma } else { ratio };
                    }
                },
            );
        });
        Ok(())
    }

    fn cuda_fwd(
        &self,
        merged: &mut CudaStorage,
        merged_l: &Layout,
        primal: &CudaStorage,
        primal_l: &Layout,
        keep: &CudaStorage,
        keep_l: &Layout,
    ) -> Result<()> {
        self.call((merged, merged_l), (primal, primal_l), (keep, keep_l)).run()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle, values as numbers};

    const ELEMENTS: usize = 1000;

    fn keep() -> Vec<u8> {
        (0..ELEMENTS).map(|at| u8::from(at % 3 == 0)).collect()
    }

    /// One step in naive loops, with the product left out: B = Ŵ + right.
    fn step_on(device: &Device) -> (Vec<f32>, Vec<f32>) {
        let tensor = |seed| matrix(oracle::random(seed, ELEMENTS), 10, device).unwrap();
        let (merged, anchor) = (tensor(1), tensor(2));
        let keep = Tensor::from_vec(keep(), (ELEMENTS / 10, 10), device).unwrap();
        let right = right_side(&merged, &keep, &anchor, 0.7, 0.3).unwrap();
        update(&merged, &right, &keep, 1.5, 0.4).unwrap();
        (numbers(&right).unwrap(), numbers(&merged).unwrap())
    }

    #[test]
    fn a_step_is_what_naive_loops_make_of_it() {
        let (merged, anchor) = (oracle::random(1, ELEMENTS), oracle::random(2, ELEMENTS));
        for device in host::devices() {
            let (right, updated) = step_on(&device);
            for at in 0..ELEMENTS {
                let kept = at % 3 == 0;
                let dual = if kept { 0.7 * merged[at] } else { -0.3 * merged[at] };
                assert!((right[at] - (dual - 0.7 * anchor[at])).abs() < 1e-6);
                let past = if kept { -0.5 } else { 0.4 };
                assert!((updated[at] - (1.5 * right[at] + past * merged[at])).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn the_kernels_do_what_the_passes_do() {
        let layout = Layout::contiguous((100, 10));
        let storage = |seed| CpuStorage::F32(oracle::random(seed, ELEMENTS));
        let (merged, anchor, keep) = (storage(1), storage(2), CpuStorage::U8(keep()));
        let op = Right { rho: 0.7, before: 0.3 };
        let (expected, _) = op.cpu_fwd(&merged, &layout, &keep, &layout, &anchor, &layout).unwrap();
        let mut found = CpuStorage::F32(vec![7.0; ELEMENTS]);
        if host::run(op.call((&mut found, &layout), (&merged, &layout), (&keep, &layout), (&anchor, &layout))) {
            assert_eq!(found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
        }
        let op = Update { sigma: 1.5, ratio: 0.4 };
        let (mut expected, mut found) = (storage(1), storage(1));
        op.cpu_fwd(&mut expected, &layout, &anchor, &layout, &keep, &layout).unwrap();
        if host::run(op.call((&mut found, &layout), (&anchor, &layout), (&keep, &layout))) {
            assert_eq!(found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
        }
    }
}
