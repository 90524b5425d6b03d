//! The one integration-test binary (one link step). `make test` builds the programs that it starts.

mod allocation;
mod deploy;
mod pipeline;
mod real;
mod refit;
mod refusals;
mod resume;
mod s3;
mod structured;
mod tidy;
