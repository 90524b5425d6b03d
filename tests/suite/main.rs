//! The one integration-test binary (one link step). `make test` builds the programs that it starts.

mod allocation;
mod assistants;
mod cluster;
mod data;
mod deploy;
mod export;
mod foreign;
mod fuzz;
mod kill;
mod network;
mod observe;
mod one_job;
mod past;
mod pipeline;
mod real;
mod refit;
mod refusals;
mod resume;
mod s3;
mod slurm;
mod soak;
mod spread;
mod structured;
mod tidy;
mod tls;
mod trace;
