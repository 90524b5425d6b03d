//! SparseGPT's sweep through a block of columns; see `prune/sweep.rs` for the pass of the host.

use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{Place, PlaceMut, values};
use crate::device::kernels::{self, Arg, Call, Launch};
use crate::linalg::select;

/// The widest block of columns: what the kernel's blocks have memory for.
pub const MOST_COLUMNS: usize = 1024;

/// What a sweep comes to, all `[rows, width]`.
#[derive(Debug, Clone)]
pub struct Swept {
    /// The weights, f32, zero where they go.
    pub weight: Tensor,
    /// What the columns after the block have to make up for, f32.
    pub errors: Tensor,
    /// 1.0 for what stays, f32.
    pub keep: Tensor,
}

/// Carries `weight [rows, width]` through a block of columns with the factor `upper [width, width]`, both f32 and contiguous.
///
/// With `group`, N of every M columns stay, by `|w| / cost` with `costs [width]` f32; else `keep` u8 `[rows, width]` tells.
///
/// # Errors
/// If shapes or types differ from these or M does not divide the width, or what the backend says.
pub fn sweep(
    weight: &Tensor,
    keep: &Tensor,
    upper: &Tensor,
    costs: &Tensor,
    group: Option<(usize, usize)>,
) -> Result<Swept> {
    let (rows, width) = weight.dims2()?;
    let fits = keep.dims() == [rows, width] && upper.dims() == [width, width] && costs.dims() == [width];
    let whole = group.is_none_or(|(_, of)| of > 0 && width.is_multiple_of(of));
    if !fits || !whole || width > MOST_COLUMNS {
        bail!("a sweep through {rows} rows of {width} columns, {group:?}, is not possible");
    }
    let out = weight.apply_op3_no_bwd(keep, upper, &Sweep { rows, width, costs, group })?;
    Ok(Swept { weight: out.get(0)?, errors: out.get(1)?, keep: out.get(2)? })
}

struct Sweep<'a> {
    rows: usize,
    width: usize,
    costs: &'a Tensor,
    group: Option<(usize, usize)>,
}

impl Sweep<'_> {
    fn call<'a, S>(
        &self,
        out: PlaceMut<'a, S>,
        (weight, keep, upper, costs): (Place<'a, S>, Place<'a, S>, Place<'a, S>, Place<'a, S>),
    ) -> Call<'a, S> {
        let (kept, of) = self.group.unwrap_or_default();
        Call {
            launch: Launch::rows("sweep", self.rows),
            args: vec![
                Arg::Write(out.0, out.1),
                Arg::Read(weight.0, weight.1),
                Arg::Read(keep.0, keep.1),
                Arg::Read(upper.0, upper.1),
                Arg::Read(costs.0, costs.1),
                Arg::Count(self.rows),
                Arg::Count(self.width),
                Arg::Count(kept),
                Arg::Count(of),
            ],
        }
    }

    fn shape(&self) -> Shape {
        (3, self.rows, self.width).into()
    }
}

/// One row: its weights, errors and choices, and room for the scores of a group.
struct Row<'a> {
    weight: &'a mut [f32],
    errors: &'a mut [f32],
    keep: &'a mut [f32],
}

impl Row<'_> {
    fn sweep(self, upper: &[f32], costs: &[f32], group: Option<(usize, usize)>) {
        let width = self.weight.len();
        let (mut scores, mut chosen) = (Vec::new(), Vec::new());
        for c in 0..width {
            if let Some((kept, of)) = group.filter(|(_, of)| c % of == 0) {
                scores.clear();
                scores.extend(self.weight[c..c + of].iter().zip(&costs[c..]).map(|(w, cost)| w.abs() / cost));
                chosen.resize(of, 0);
                select::keep_n_of_groups(&scores, kept, of, &mut chosen);
                self.keep[c..c + of].iter_mut().zip(&chosen).for_each(|(keep, chosen)| *keep = f32::from(*chosen));
            }
            let factors = &upper[c * width..][..width];
            let stays = self.keep[c] > 0.0;
            let error = if stays { 0.0 } else { self.weight[c] / factors[c] };
            self.weight[c] = if stays { self.weight[c] } else { 0.0 };
            self.errors[c] = error;
            self.weight[c + 1..].iter_mut().zip(&factors[c + 1..]).for_each(|(w, factor)| *w -= error * factor);
        }
    }
}

impl CustomOp3 for Sweep<'_> {
    fn name(&self) -> &'static str {
        "sweep"
    }

    fn cpu_fwd(
        &self,
        weight: &CpuStorage,
        weight_l: &Layout,
        keep: &CpuStorage,
        keep_l: &Layout,
        upper: &CpuStorage,
        upper_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.costs.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("tensors of one sweep are on one device") };
        let (costs, upper) = (values::<f32>((storage, layout))?, values::<f32>((upper, upper_l))?);
        let mut out = values::<f32>((weight, weight_l))?.to_vec();
        let elements = out.len();
        out.resize(2 * elements, 0.0);
        out.extend(values::<u8>((keep, keep_l))?.iter().map(|&keep| f32::from(keep)));
        let (weight, rest) = out.split_at_mut(elements);
        let (errors, keep) = rest.split_at_mut(elements);
        let rows = weight.par_chunks_mut(self.width).zip(errors.par_chunks_mut(self.width));
        let rows = rows.zip(keep.par_chunks_mut(self.width));
        rows.for_each(|((weight, errors), keep)| Row { weight, errors, keep }.sweep(upper, costs, self.group));
        Ok((CpuStorage::F32(out), self.shape()))
    }

    fn cuda_fwd(
        &self,
        weight: &CudaStorage,
        weight_l: &Layout,
        keep: &CudaStorage,
        keep_l: &Layout,
        upper: &CudaStorage,
        upper_l: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (costs, costs_l) = self.costs.storage_and_layout();
        let Storage::Cuda(costs) = &*costs else { bail!("tensors of one sweep are on one device") };
        let layout = Layout::contiguous(self.shape());
        let mut out = kernels::f32_like(weight, 3 * self.rows * self.width)?;
        self.call((&mut out, &layout), ((weight, weight_l), (keep, keep_l), (upper, upper_l), (costs, costs_l)))
            .run()?;
        Ok((out, self.shape()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle, values as numbers};

    const ROWS: usize = 5;
    const WIDTH: usize = 24;

    fn upper() -> Vec<f32> {
        let random = oracle::random(7, WIDTH * WIDTH).into_iter().enumerate();
        random
            .map(|(at, x)| match (at / WIDTH).cmp(&(at % WIDTH)) {
                std::cmp::Ordering::Less => 0.3 * x,
                std::cmp::Ordering::Equal => 1.0 + x.abs(),
                std::cmp::Ordering::Greater => 0.0,
            })
            .collect()
    }

    fn costs() -> Vec<f32> {
        (0..WIDTH).map(|c| if c == 3 { f32::INFINITY } else { upper()[c * (WIDTH + 1)] }).collect()
    }

    fn keep() -> Vec<u8> {
        (0..ROWS * WIDTH).map(|at| u8::from(at % 7 < 4)).collect()
    }

    fn swept_on(device: &Device, group: Option<(usize, usize)>) -> [Vec<f32>; 3] {
        let weight = matrix(oracle::random(1, ROWS * WIDTH), WIDTH, device).unwrap();
        let keep = Tensor::from_vec(keep(), (ROWS, WIDTH), device).unwrap();
        let upper = matrix(upper(), WIDTH, device).unwrap();
        let costs = Tensor::from_vec(costs(), WIDTH, device).unwrap();
        let swept = sweep(&weight, &keep, &upper, &costs, group).unwrap();
        [&swept.weight, &swept.errors, &swept.keep].map(|tensor| numbers(tensor).unwrap())
    }

    #[test]
    fn what_goes_is_paid_for_by_what_comes_after() {
        // W' = W − E·U, whatever was chosen, and a group keeps exactly N.
        for device in host::devices() {
            for group in [None, Some((2, 4)), Some((1, 3)), Some((5, 8))] {
                let [weight, errors, kept] = swept_on(&device, group);
                let dense = oracle::wide(&oracle::random(1, ROWS * WIDTH));
                let paid = oracle::product(&oracle::wide(&errors), &oracle::wide(&upper()), WIDTH, WIDTH);
                for at in 0..ROWS * WIDTH {
                    let expected = dense[at] - paid[at];
                    assert!((f64::from(weight[at]) - expected).abs() < 1e-4, "{device:?} {group:?} {at}");
                    assert_eq!(kept[at] > 0.0, weight[at].abs() > 0.0, "{device:?} {group:?}");
                }
                match group {
                    Some((n, m)) => {
                        assert!(kept.chunks(m).all(|group| group.iter().filter(|kept| **kept > 0.0).count() == n));
                        let dead = kept.chunks(WIDTH).filter(|row| row[3] > 0.0).count();
                        assert!(n > 2 || dead == 0, "a dead channel goes first");
                    }
                    None => assert_eq!(kept, keep().into_iter().map(f32::from).collect::<Vec<_>>()),
                }
            }
        }
    }

    #[test]
    fn the_kernel_does_what_the_pass_does() {
        let (of_rows, of_upper, of_costs) =
            (Layout::contiguous((ROWS, WIDTH)), Layout::contiguous((WIDTH, WIDTH)), Layout::contiguous(WIDTH));
        let of_out = Layout::contiguous((3, ROWS, WIDTH));
        let weight = CpuStorage::F32(oracle::random(1, ROWS * WIDTH));
        let (keep, upper, unused) = (CpuStorage::U8(keep()), CpuStorage::F32(upper()), CpuStorage::F32(costs()));
        let costs = Tensor::from_vec(costs(), WIDTH, &Device::Cpu).unwrap();
        for group in [None, Some((2, 4)), Some((1, 3)), Some((5, 8))] {
            let op = Sweep { rows: ROWS, width: WIDTH, costs: &costs, group };
            let (expected, _) = op.cpu_fwd(&weight, &of_rows, &keep, &of_rows, &upper, &of_upper).unwrap();
            let mut found = CpuStorage::F32(vec![7.0; 3 * ROWS * WIDTH]);
            let args = ((&weight, &of_rows), (&keep, &of_rows), (&upper, &of_upper), (&unused, &of_costs));
            if host::run(op.call((&mut found, &of_out), args)) {
                let (found, expected) = (found.as_slice::<f32>().unwrap(), expected.as_slice::<f32>().unwrap());
                assert!(found.iter().zip(expected).all(|(x, y)| x.to_bits() == y.to_bits()), "{group:?}");
            }
        }
    }

    #[test]
    fn blocks_that_do_not_fit_are_refused() {
        let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
        let refused = |width: usize, group| {
            let costs = Tensor::zeros(width, DType::F32, &Device::Cpu).unwrap();
            let upper = zeros((width, width), DType::F32);
            sweep(&zeros((2, width), DType::F32), &zeros((2, width), DType::U8), &upper, &costs, group).is_err()
        };
        assert!(refused(10, Some((2, 4))) && refused(8, Some((0, 0))) && refused(MOST_COLUMNS + 1, None));
        assert!(!refused(8, Some((2, 4))));
    }
}
