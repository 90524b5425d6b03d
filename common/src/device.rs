//! What a worker computes on: the choice that a person, a configuration or a launcher makes.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The device that is asked for: `auto`, `cpu`, or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceChoice {
    /// A GPU if there is one that can be used, else the CPU; what it was and why is told.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number, as the CUDA driver counts them, or nothing at all.
    Cuda(usize),
}

/// Text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no device: give auto, cpu, or cuda:N with the number of a GPU")]
pub struct NoDevice(String);

impl FromStr for DeviceChoice {
    type Err = NoDevice;

    fn from_str(text: &str) -> Result<Self, NoDevice> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            _ => {
                let number = text.strip_prefix("cuda:").filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
                let number = number.and_then(|digits| digits.parse().ok());
                number.map(Self::Cuda).ok_or_else(|| NoDevice(text.to_owned()))
            }
        }
    }
}

impl TryFrom<String> for DeviceChoice {
    type Error = NoDevice;

    fn try_from(text: String) -> Result<Self, NoDevice> {
        text.parse()
    }
}

impl From<DeviceChoice> for String {
    fn from(choice: DeviceChoice) -> Self {
        choice.to_string()
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// What `espalier-worker devices --json` says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Devices {
    /// The GPUs that this build can use, in the driver's order.
    pub gpus: Vec<Gpu>,
    /// Why there are none, if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absent: Option<String>,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// What its maker calls it.
    pub name: String,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// What it can do, e.g. `sm_90`: results are the same bits only within one.
    pub architecture: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_read_as_they_are_written() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(0), DeviceChoice::Cuda(13)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
    }

    #[test]
    fn anything_else_is_refused_with_what_there_is() {
        for text in ["gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "CPU", ""] {
            let refusal = text.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(refusal.contains(&format!("`{text}`")) && refusal.contains("cuda:N"), "{refusal}");
        }
    }
}
