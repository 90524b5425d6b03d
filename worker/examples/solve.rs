//! Solves one layer problem again and again, for `tests/reference/peers/solvers.py`:
//! `cargo run --release --workspace --example solve -- PROBLEM.safetensors`.
//!
//! The problem holds `weight [out, in]` and `gram [in, in]`, the mean over tokens. Each line on stdin is one solve, a JSON object
//! `{"method", "params", "pattern", "output"}` with a pattern of `0.5` or `2:4`; what is asked for is solved from the statistics
//! on, nothing shared with the solve before, and written to `output`. Each line on stdout is `{"seconds", "iterations", "flops"}`.

#![allow(clippy::print_stdout, reason = "answers are what this program is for")]

use std::io::BufRead;
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use espalier_common::clock::Stopwatch;
use espalier_common::pattern::Pattern;
use espalier_worker::prune::{self, InputStats, Problem, SolveCtx};
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    method: String,
    #[serde(default)]
    params: Value,
    pattern: String,
    output: String,
}

fn main() -> Result<()> {
    let path = std::env::args_os().nth(1).context("usage: solve PROBLEM.safetensors")?;
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    let tensor = |name: &str| -> Result<Tensor> {
        Ok(tensors.get(name).with_context(|| format!("the problem has no tensor {name}"))?.to_dtype(DType::F32)?)
    };
    let stats = InputStats { gram: tensor("gram")?, dense: None, tokens: 1, held_out: None };
    let (weight, stats) = (tensor("weight")?, Arc::new(stats));
    for line in std::io::stdin().lock().lines() {
        let request: Request = serde_json::from_str(&line?)?;
        println!("{}", answer(&request, &weight, &stats)?);
    }
    Ok(())
}

fn answer(request: &Request, weight: &Tensor, stats: &Arc<InputStats>) -> Result<Value> {
    let pattern = match request.pattern.parse() {
        Ok(sparsity) => Pattern::Unstructured { sparsity },
        Err(_) => Pattern::parse_nofm(&request.pattern)?,
    };
    let problem = Problem { tensor: "weight", weight, pattern, imported: None };
    let (solver, _) = prune::build(&request.method, &request.params)?;
    let ctx = SolveCtx::default();
    let watch = Stopwatch::start();
    let solution = solver.prepare(Arc::clone(stats), &ctx)?.solve(&problem, solver.blocks(&problem)?, &ctx)?;
    let seconds = watch.seconds();
    solution.weight.save_safetensors("weight", &request.output)?;
    Ok(json!({ "seconds": seconds, "iterations": solution.iterations, "flops": solution.flops }))
}
