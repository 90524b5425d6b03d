//! Sums in f64, of products in f32 and of other sums.

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp2, Layout, Result, Tensor, bail};

use super::{Place, PlaceMut, values};
use crate::device::kernels::{Arg, Call, Launch};

/// `sum ← sum + values`, element by element, for a contiguous f64 `sum` and contiguous f32 or f64 `values` of its shape.
///
/// # Errors
/// If they are anything else, or what the backend says.
pub fn accumulate(sum: &Tensor, values: &Tensor) -> Result<()> {
    if sum.dims() != values.dims() {
        bail!("{:?} cannot be added to {:?}", values.dims(), sum.dims());
    }
    if sum.dtype() != DType::F64 || ![DType::F32, DType::F64].contains(&values.dtype()) {
        bail!("{:?} cannot be added to {:?}: sums are f64", values.dtype(), sum.dtype());
    }
    sum.inplace_op2(values, &Accumulate { of_sums: values.dtype() == DType::F64 })
}

struct Accumulate {
    /// Whether what is added is f64 too.
    of_sums: bool,
}

impl Accumulate {
    fn call<'a, S>(&self, sum: PlaceMut<'a, S>, values: Place<'a, S>) -> Call<'a, S> {
        let elements = values.1.shape().elem_count();
        Call {
            launch: Launch::over(if self.of_sums { "accumulate_sums" } else { "accumulate" }, elements),
            args: vec![Arg::Write(sum.0, sum.1), Arg::Read(values.0, values.1), Arg::Count(elements)],
        }
    }
}

impl InplaceOp2 for Accumulate {
    fn name(&self) -> &'static str {
        "accumulate"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, sum_l: &Layout, x: &CpuStorage, x_l: &Layout) -> Result<()> {
        let sum = match (sum_l.contiguous_offsets(), sum) {
            (Some((start, end)), CpuStorage::F64(sum)) => sum[start..end].iter_mut(),
            _ => bail!("sums are a contiguous f64 tensor"),
        };
        if self.of_sums {
            sum.zip(values::<f64>((x, x_l))?).for_each(|(sum, x)| *sum += x);
        } else {
            sum.zip(values::<f32>((x, x_l))?).for_each(|(sum, x)| *sum += f64::from(*x));
        }
        Ok(())
    }

    fn cuda_fwd(&self, sum: &mut CudaStorage, sum_l: &Layout, x: &CudaStorage, x_l: &Layout) -> Result<()> {
        self.call((sum, sum_l), (x, x_l)).run()
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::linalg::ops::host;
    use crate::linalg::{matrix, oracle};

    /// Sums of three f32 matrices, and that sum and itself.
    fn sums_on(device: &Device) -> Vec<f64> {
        let sum = Tensor::zeros((3, 100), DType::F64, device).unwrap();
        for seed in 0..3 {
            accumulate(&sum, &matrix(oracle::random(seed, 300), 100, device).unwrap()).unwrap();
        }
        let twice = sum.copy().unwrap();
        accumulate(&twice, &sum).unwrap();
        twice.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn sums_keep_the_digits_that_f32_would_lose() {
        let expected: Vec<f64> =
            (0..300).map(|at| 2.0 * (0..3).map(|seed| f64::from(oracle::random(seed, 300)[at])).sum::<f64>()).collect();
        for device in host::devices() {
            assert!(sums_on(&device) == expected, "{device:?}");
        }
    }

    #[test]
    fn the_kernel_does_what_the_pass_does() {
        let doubles = oracle::random(2, 1000).into_iter().map(|value| f64::from(value) / 3.0).collect();
        for (x, of_sums) in [(CpuStorage::F32(oracle::random(1, 1000)), false), (CpuStorage::F64(doubles), true)] {
            let (mut sum, pass) = (CpuStorage::F64(vec![0.25; 1000]), Accumulate { of_sums });
            let layout = Layout::contiguous(1000);
            let mut expected = sum.clone();
            pass.cpu_fwd(&mut expected, &layout, &x, &layout).unwrap();
            if host::run(pass.call((&mut sum, &layout), (&x, &layout))) {
                assert_eq!(sum.as_slice::<f64>().unwrap(), expected.as_slice::<f64>().unwrap());
            }
        }
    }

    #[test]
    fn other_shapes_and_types_are_refused() {
        let sum = Tensor::zeros((2, 2), DType::F64, &Device::Cpu).unwrap();
        let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu).unwrap();
        assert!(accumulate(&sum, &x).is_err() && accumulate(&x, &x).is_err());
    }
}
