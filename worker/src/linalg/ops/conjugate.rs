//! A step of conjugate gradients of many rows, each on its own support; see `linalg/pcg.rs` for what is solved.

use candle_core::{CpuStorage, CudaStorage, InplaceOp3, Layout, Result, Storage, StorageRef, Tensor, bail};
use rayon::prelude::*;

use super::{Place, PlaceMut, values, values_mut};
use crate::device::kernels::{Arg, Call, Launch};
use crate::linalg::quadratic::dot;

/// What a step is measured by.
#[derive(Debug, Clone, Copy)]
pub struct Goals<'a> {
    /// 1 / the gram's diagonal, `[n]` f32: the preconditioner.
    pub inverse_diagonal: &'a Tensor,
    /// Where ⟨R, M⁻¹R⟩ of a row must fall to, `[rows]` f64.
    pub goals: &'a Tensor,
}

/// One step: `state` `[3, rows, n]` f32 holds V, R and P, `image` is `P·G`, `keep` u8 the support, both `[rows, n]`.
///
/// A row whose ⟨R, M⁻¹R⟩ is at its goal stays as it is. One without curvature gives up: its P becomes zero.
///
/// # Errors
/// If shapes or types differ from these, or what the backend says.
pub fn conjugate_step(state: &Tensor, image: &Tensor, keep: &Tensor, goals: Goals<'_>) -> Result<()> {
    let (three, rows, n) = state.dims3()?;
    let right = three == 3
        && image.dims() == [rows, n]
        && keep.dims() == [rows, n]
        && goals.inverse_diagonal.dims() == [n]
        && goals.goals.dims() == [rows];
    if !right {
        bail!("a step of {:?} does not fit an image of {:?}", state.dims(), image.dims());
    }
    state.inplace_op3(image, keep, &Step { rows, n, goals })
}

struct Step<'a> {
    rows: usize,
    n: usize,
    goals: Goals<'a>,
}

impl Step<'_> {
    fn call<'a, S>(
        &self,
        state: PlaceMut<'a, S>,
        image: Place<'a, S>,
        keep: Place<'a, S>,
        inverse: Place<'a, S>,
        goals: Place<'a, S>,
    ) -> Call<'a, S> {
        Call {
            launch: Launch::rows("conjugate_step", self.rows),
            args: vec![
                Arg::Write(state.0, state.1),
                Arg::Read(image.0, image.1),
                Arg::Read(keep.0, keep.1),
                Arg::Read(inverse.0, inverse.1),
                Arg::Read(goals.0, goals.1),
                Arg::Count(self.rows),
                Arg::Count(self.n),
            ],
        }
    }
}

/// The storage of a tensor on the host.
fn on_cpu<'a>(storage: &'a StorageRef<'_>) -> Result<&'a CpuStorage> {
    match &**storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => bail!("tensors of one step are on one device"),
    }
}

/// The storage of a tensor on a GPU.
fn on_gpu<'a>(storage: &'a StorageRef<'_>) -> Result<&'a CudaStorage> {
    match &**storage {
        Storage::Cuda(storage) => Ok(storage),
        _ => bail!("tensors of one step are on one device"),
    }
}

impl InplaceOp3 for Step<'_> {
    fn name(&self) -> &'static str {
        "conjugate-step"
    }

    fn cpu_fwd(
        &self,
        state: &mut CpuStorage,
        state_l: &Layout,
        image: &CpuStorage,
        image_l: &Layout,
        keep: &CpuStorage,
        keep_l: &Layout,
    ) -> Result<()> {
        let Self { rows, n, goals } = *self;
        let (diagonal, diagonal_l) = goals.inverse_diagonal.storage_and_layout();
        let (goals, goals_l) = goals.goals.storage_and_layout();
        let inverse = values::<f32>((on_cpu(&diagonal)?, diagonal_l))?;
        let goals = values::<f64>((on_cpu(&goals)?, goals_l))?;
        let (image, keep) = (values::<f32>((image, image_l))?, values::<u8>((keep, keep_l))?);
        let (v, rest) = values_mut((state, state_l))?.split_at_mut(rows * n);
        let (r, p) = rest.split_at_mut(rows * n);
        let of_rows = v.par_chunks_mut(n).zip(r.par_chunks_mut(n)).zip(p.par_chunks_mut(n)).enumerate();
        of_rows.for_each_init(
            || vec![0.0; n],
            |preconditioned, (row, ((v, r), p))| {
                let (q, keep) = (&image[row * n..][..n], &keep[row * n..][..n]);
                let mut precondition = |r: &[f32]| {
                    preconditioned.iter_mut().zip(r).zip(inverse).for_each(|((z, r), d)| *z = r * d);
                    dot(r, preconditioned)
                };
                let energy = precondition(r);
                if !(energy > goals[row] && energy > 0.0) {
                    return;
                }
                let curvature = dot(p, q);
                // Not so for NaN either.
                let can_move = curvature > 0.0;
                if !can_move {
                    p.fill(0.0);
                    return;
                }
                let alpha = (energy / curvature) as f32;
                v.iter_mut().zip(&*p).for_each(|(v, p)| *v += alpha * p);
                for ((r, q), keep) in r.iter_mut().zip(q).zip(keep) {
                    *r = (*r - alpha * q) * f32::from(*keep);
                }
                let beta = (precondition(r) / energy) as f32;
                p.iter_mut().zip(&*preconditioned).for_each(|(p, z)| *p = z + beta * *p);
            },
        );
        Ok(())
    }

    fn cuda_fwd(
        &self,
        state: &mut CudaStorage,
        state_l: &Layout,
        image: &CudaStorage,
        image_l: &Layout,
        keep: &CudaStorage,
        keep_l: &Layout,
    ) -> Result<()> {
        let (diagonal, diagonal_l) = self.goals.inverse_diagonal.storage_and_layout();
        let (goals, goals_l) = self.goals.goals.storage_and_layout();
        let (inverse, goals) = ((on_gpu(&diagonal)?, diagonal_l), (on_gpu(&goals)?, goals_l));
        self.call((state, state_l), (image, image_l), (keep, keep_l), inverse, goals).run()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle};

    const ROWS: usize = 6;
    const N: usize = 300;

    /// Before a step.
    struct Start {
        state: Vec<f32>,
        image: Vec<f32>,
        keep: Vec<u8>,
        inverse: Vec<f32>,
        goals: Vec<f64>,
    }

    /// The second row is at its goal, the third has no curvature.
    fn start() -> Start {
        let keep: Vec<u8> = (0..ROWS * N).map(|at| u8::from(at % 5 < 3)).collect();
        let masked = |seed: u64| -> Vec<f32> {
            oracle::random(seed, ROWS * N).iter().zip(&keep).map(|(x, keep)| x * f32::from(*keep)).collect()
        };
        let inverse: Vec<f32> = (0..N).map(|j| 1.0 / (1.0 + j as f32 / 100.0)).collect();
        let (values, residual) = (masked(1), masked(2));
        let direction: Vec<f32> = residual.iter().zip(inverse.iter().cycle()).map(|(r, d)| r * d).collect();
        let mut image: Vec<f32> = direction.iter().map(|p| 2.0 * p + 0.1).collect();
        image[2 * N..3 * N].iter_mut().for_each(|q| *q = 0.0);
        let mut goals = vec![1e-9; ROWS];
        goals[1] = f64::MAX;
        Start { state: [values, residual, direction].concat(), image, keep, inverse, goals }
    }

    /// The step in f64, row by row.
    fn naive() -> Vec<f64> {
        let Start { state, image, keep, inverse, goals } = start();
        let wide = |at: usize| f64::from(state[at]);
        let mut out: Vec<f64> = (0..state.len()).map(wide).collect();
        for row in 0..ROWS {
            let (v, r, p) = (row * N, (ROWS + row) * N, (2 * ROWS + row) * N);
            let energy: f64 = (0..N).map(|j| wide(r + j).powi(2) * f64::from(inverse[j])).sum();
            let curvature: f64 = (0..N).map(|j| wide(p + j) * f64::from(image[row * N + j])).sum();
            if energy <= goals[row] {
                continue;
            }
            if curvature <= 0.0 {
                out[p..p + N].fill(0.0);
                continue;
            }
            let alpha = energy / curvature;
            for j in 0..N {
                out[v + j] += alpha * wide(p + j);
                let moved = wide(r + j) - alpha * f64::from(image[row * N + j]);
                out[r + j] = moved * f64::from(keep[row * N + j]);
            }
            let beta = (0..N).map(|j| out[r + j].powi(2) * f64::from(inverse[j])).sum::<f64>() / energy;
            (0..N).for_each(|j| out[p + j] = out[r + j] * f64::from(inverse[j]) + beta * wide(p + j));
        }
        out
    }

    fn assert_close(found: &[f32], what: &str) {
        // α and β are rounded to f32, and so is each of three operations.
        let expected = naive();
        let size = expected.iter().fold(0.0f64, |size, x| size.max(x.abs()));
        for (at, (x, y)) in found.iter().zip(&expected).enumerate() {
            assert!((f64::from(*x) - y).abs() <= 8.0 * f64::from(f32::EPSILON) * size, "{what} at {at}: {x} {y}");
        }
    }

    fn step_on(device: &Device) -> Vec<f32> {
        let Start { state, image, keep, inverse, goals } = start();
        let state = Tensor::from_vec(state, (3, ROWS, N), device).unwrap();
        let keep = Tensor::from_vec(keep, (ROWS, N), device).unwrap();
        let inverse_diagonal = &Tensor::from_vec(inverse, N, device).unwrap();
        let goals = &Tensor::from_vec(goals, ROWS, device).unwrap();
        let image = matrix(image, N, device).unwrap();
        conjugate_step(&state, &image, &keep, Goals { inverse_diagonal, goals }).unwrap();
        state.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn a_step_is_what_naive_loops_make_of_it() {
        for device in host::devices() {
            assert_close(&step_on(&device), &format!("{device:?}"));
        }
    }

    #[test]
    fn the_kernel_does_what_the_pass_does() {
        let Start { state, image, keep, inverse, goals } = start();
        let mut state = CpuStorage::F32(state);
        let (image, keep) = (CpuStorage::F32(image), CpuStorage::U8(keep));
        let (of_state, of_rows) = (Layout::contiguous((3, ROWS, N)), Layout::contiguous((ROWS, N)));
        let (of_inverse, of_goals) = (Layout::contiguous(N), Layout::contiguous(ROWS));
        let unused = Tensor::zeros(1, candle_core::DType::F32, &Device::Cpu).unwrap();
        let op = Step { rows: ROWS, n: N, goals: Goals { inverse_diagonal: &unused, goals: &unused } };
        let (inverse, goals) = (CpuStorage::F32(inverse), CpuStorage::F64(goals));
        let call = op.call(
            (&mut state, &of_state),
            (&image, &of_rows),
            (&keep, &of_rows),
            (&inverse, &of_inverse),
            (&goals, &of_goals),
        );
        if host::run(call) {
            assert_close(state.as_slice::<f32>().unwrap(), "the kernel");
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        let (inverse_diagonal, goals) = (&zeros(&[4]), &zeros(&[2]));
        let step = |image: &[usize]| {
            conjugate_step(&zeros(&[3, 2, 4]), &zeros(image), &zeros(&[2, 4]), Goals { inverse_diagonal, goals })
        };
        assert!(step(&[2, 5]).is_err());
    }
}
