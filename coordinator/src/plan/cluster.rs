//! `cluster.toml`: the machines that a plan is made for.

use std::path::Path;

use espalier_common::config::{self, ConfigError};
use espalier_common::job::parse_size;
use serde::{Deserialize, Serialize};

/// More workers than this are a slip of the pen.
const MOST_WORKERS: usize = 65_536;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    /// `[network]`
    #[serde(default)]
    pub network: Network,
    /// `[storage]`
    #[serde(default)]
    pub storage: Storage,
    /// `[products]`
    #[serde(default)]
    pub products: Products,
    /// `[solver]`
    #[serde(default)]
    pub solver: Solver,
    /// `[[workers]]`: kinds of workers.
    pub workers: Vec<WorkerKind>,
}

/// `[network]`: what workers reach each other by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Between any two workers.
    pub gigabits_per_second: f64,
}

impl Default for Network {
    fn default() -> Self {
        Self { gigabits_per_second: 10.0 }
    }
}

/// `[storage]`: what the checkpoint is read from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// For one worker.
    pub gigabytes_per_second: f64,
}

impl Default for Storage {
    fn default() -> Self {
        Self { gigabytes_per_second: 1.0 }
    }
}

/// `[products]`: how fast forward passes, grams and checks are beside the products that a worker measures itself by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Products {
    /// Share of that speed which they reach: attention, norms and the copying between products take the rest.
    pub efficiency: f64,
}

impl Default for Products {
    /// Measured on two AVX-512 threads with SmolLM2-135M: 0.58 to 0.64. Wider models leave less beside the products.
    fn default() -> Self {
        Self { efficiency: 0.6 }
    }
}

/// `[solver]`: how much a method computes, where somebody knows better than the worker that reads the model's headers.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Solver {
    /// Passes over rows · columns² for each sublayer: 1 for SparseGPT, the number of products for an iterative method. What the
    /// method says of itself if none is given.
    pub sweeps: Option<f64>,
    /// Share of the matrix-product speed that solving reaches. What the method says of itself if none is given.
    pub efficiency: Option<f64>,
}

/// `[[workers]]`: some workers of one kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerKind {
    /// A name for people.
    pub name: String,
    /// How many there are.
    #[serde(default = "one")]
    pub count: usize,
    /// Memory of each, e.g. `80GB`.
    pub memory: String,
    /// Matrix-product speed of each in f32, as a worker measures it when it starts.
    pub gflops: f64,
    /// What all of them reach together, where they share a machine and have more threads than it has processors. Each is then taken
    /// to have an even part of it at all times, if that is less than its own speed.
    pub machine_gflops: Option<f64>,
}

fn one() -> usize {
    1
}

/// One worker of the plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedWorker {
    /// Its kind's name, numbered if there are several.
    pub name: String,
    /// Memory it has.
    pub memory_bytes: u64,
    /// Its speed.
    pub gflops: f64,
}

/// Why a cluster cannot be planned for.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The file cannot be read.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A key has a value that makes no sense.
    #[error("{key} is {value}, but must be {must}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What it must be.
        must: &'static str,
    },
}

impl ClusterSpec {
    /// What is taken for granted of machines that nobody has described.
    pub fn usual() -> Self {
        Self {
            network: Network::default(),
            storage: Storage::default(),
            products: Products::default(),
            solver: Solver::default(),
            workers: Vec::new(),
        }
    }

    /// Reads the file.
    ///
    /// # Errors
    /// See [`ClusterError`].
    pub fn read(path: &Path) -> Result<Self, ClusterError> {
        let spec: Self = config::load_document(path)?;
        spec.workers()?;
        Ok(spec)
    }

    /// Every worker, kind by kind.
    ///
    /// # Errors
    /// `Value`.
    pub fn workers(&self) -> Result<Vec<PlannedWorker>, ClusterError> {
        let wrong = |key: String, value: String, must| ClusterError::Value { key, value, must };
        let positive = |key: &str, value: f64| {
            let valid = value.is_finite() && value > 0.0;
            if valid { Ok(()) } else { Err(wrong(key.to_owned(), value.to_string(), "a number above 0")) }
        };
        positive("[network] gigabits_per_second", self.network.gigabits_per_second)?;
        positive("[storage] gigabytes_per_second", self.storage.gigabytes_per_second)?;
        positive("[products] efficiency", self.products.efficiency)?;
        for (key, value) in [("sweeps", self.solver.sweeps), ("efficiency", self.solver.efficiency)] {
            value.map_or(Ok(()), |value| positive(&format!("[solver] {key}"), value))?;
        }
        let total = self.workers.iter().fold(0usize, |sum, kind| sum.saturating_add(kind.count));
        if total == 0 || total > MOST_WORKERS {
            return Err(wrong("number of [[workers]]".to_owned(), total.to_string(), "between 1 and 65536"));
        }
        let mut workers = Vec::with_capacity(total);
        for kind in &self.workers {
            let key = |name: &str| format!("[[workers]] {} {name}", kind.name);
            positive(&key("gflops"), kind.gflops)?;
            kind.machine_gflops.map_or(Ok(()), |speed| positive(&key("machine_gflops"), speed))?;
            let part = kind.machine_gflops.map_or(f64::INFINITY, |speed| speed / kind.count as f64);
            let memory_bytes = parse_size(&kind.memory)
                .ok_or_else(|| wrong(key("memory"), kind.memory.clone(), "a size such as 80GB or 512MiB"))?;
            for index in 0..kind.count {
                let name = if kind.count == 1 { kind.name.clone() } else { format!("{}-{index}", kind.name) };
                workers.push(PlannedWorker { name, memory_bytes, gflops: kind.gflops.min(part) });
            }
        }
        Ok(workers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> ClusterSpec {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn kinds_are_counted_out() {
        let spec = spec(
            "[[workers]]\nname = \"gpu\"\ncount = 2\nmemory = \"80GB\"\ngflops = 5e4\n\
             [[workers]]\nname = \"cpu\"\nmemory = \"64GiB\"\ngflops = 500.0\n",
        );
        let workers = spec.workers().unwrap();
        let names: Vec<_> = workers.iter().map(|worker| worker.name.as_str()).collect();
        assert_eq!(names, ["gpu-0", "gpu-1", "cpu"]);
        assert_eq!((workers[1].memory_bytes, workers[2].memory_bytes), (80_000_000_000, 64 << 30));
    }

    #[test]
    fn workers_of_a_machine_share_what_it_reaches() {
        let speeds = |count: usize| {
            let kind =
                format!("name = \"cpu\"\nmemory = \"4GB\"\ngflops = 70.0\ncount = {count}\nmachine_gflops = 150.0");
            let workers = spec(&format!("[[workers]]\n{kind}")).workers().unwrap();
            workers.iter().map(|worker| worker.gflops).collect::<Vec<_>>()
        };
        assert_eq!((speeds(2), speeds(3)), (vec![70.0; 2], vec![50.0; 3]));
    }

    #[test]
    fn values_that_make_no_sense_are_named() {
        let kind = "[[workers]]\nname = \"gpu\"\n";
        for (text, named) in [
            ("memory = \"much\"\ngflops = 1.0", "[[workers]] gpu memory is much"),
            ("memory = \"1GB\"\ngflops = 0.0", "[[workers]] gpu gflops is 0"),
            ("memory = \"1GB\"\ngflops = 1.0\nmachine_gflops = -2.0", "[[workers]] gpu machine_gflops is -2"),
            ("memory = \"1GB\"\ngflops = 1.0\ncount = 0", "number of [[workers]] is 0"),
            ("memory = \"1GB\"\ngflops = 1.0\n[network]\ngigabits_per_second = -1.0", "gigabits_per_second is -1"),
        ] {
            let error = spec(&format!("{kind}{text}")).workers().unwrap_err().to_string();
            assert!(error.contains(named), "{named}: {error}");
        }
    }
}
