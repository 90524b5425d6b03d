//! What `[method]` says of reconstruction, beside the method's own parameters.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

const PREFIX: &str = "reconstruct";

/// What is tuned as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Attention by itself, feed-forward by itself.
    Submodule,
}

/// How the errors of different tokens are weighed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// All alike.
    Absolute,
    /// By the length of the token's hidden state, which the next norm divides by.
    Relative,
}

/// Options of reconstruction: `reconstruct` and the keys that start with `reconstruct_`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// What is tuned as one.
    #[serde(rename = "reconstruct")]
    pub scope: Scope,
    /// Most passes over the sequences.
    #[serde(rename = "reconstruct_epochs", default = "default_epochs")]
    pub epochs: u32,
    /// Adam's first step, as a share of the root mean square of a matrix' surviving weights; it falls to 0 along a cosine.
    #[serde(rename = "reconstruct_learning_rate", default = "default_learning_rate")]
    pub learning_rate: f64,
    /// Sequences per step.
    #[serde(rename = "reconstruct_batch", default = "default_batch")]
    pub batch: usize,
    /// Share of what was lost before a half that its targets make up for: 0 to give what the dense half gives on the inputs at
    /// hand, 1 to bring the residual stream back to the dense model's. Epochs are judged by the latter either way.
    #[serde(rename = "reconstruct_stream", default = "default_stream")]
    pub stream: f64,
    /// How the errors of different tokens are weighed.
    #[serde(rename = "reconstruct_loss", default = "default_loss")]
    pub loss: Loss,
}

fn default_epochs() -> u32 {
    8
}

fn default_learning_rate() -> f64 {
    0.01
}

fn default_batch() -> usize {
    4
}

fn default_stream() -> f64 {
    1.0
}

fn default_loss() -> Loss {
    Loss::Relative
}

/// Why the options cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Unknown, or of the wrong type.
    #[error("options of reconstruct")]
    Syntax(#[source] serde_json::Error),
    /// There are options of something that was not asked for.
    #[error("{key} is set, but reconstruct is not: set reconstruct = \"submodule\"")]
    NotAsked {
        /// The key.
        key: String,
    },
    /// A number that must be positive is not.
    #[error("{key} is {value}, but must be {wanted}")]
    Range {
        /// The key.
        key: &'static str,
        /// What it was.
        value: f64,
        /// What it may be.
        wanted: &'static str,
    },
}

impl Options {
    /// Takes the options out of a method's parameters; `None` if there are none.
    ///
    /// # Errors
    /// See [`OptionsError`].
    pub fn take(params: &mut Map<String, Value>) -> Result<Option<Self>, OptionsError> {
        let own = |key: &str| key.strip_prefix(PREFIX).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'));
        let keys: Vec<String> = params.keys().filter(|key| own(key)).cloned().collect();
        let Some(first) = keys.first() else { return Ok(None) };
        if !params.contains_key(PREFIX) {
            return Err(OptionsError::NotAsked { key: first.clone() });
        }
        let options = keys.iter().filter_map(|key| params.remove_entry(key)).collect();
        let options = Self::deserialize(Value::Object(options)).map_err(OptionsError::Syntax)?;
        options.check()?;
        Ok(Some(options))
    }

    /// All options by their keys.
    pub fn filled(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(options)) => options,
            _ => Map::new(),
        }
    }

    fn check(&self) -> Result<(), OptionsError> {
        let range = |key, value, wanted| Err(OptionsError::Range { key, value, wanted });
        match *self {
            Self { epochs, .. } if !(1..=1000).contains(&epochs) => {
                range("reconstruct_epochs", f64::from(epochs), "between 1 and 1000")
            }
            Self { batch, .. } if !(1..=4096).contains(&batch) => {
                range("reconstruct_batch", batch as f64, "between 1 and 4096")
            }
            Self { learning_rate, .. } if !(learning_rate > 0.0 && learning_rate <= 1.0) => {
                range("reconstruct_learning_rate", learning_rate, "above 0 and at most 1")
            }
            Self { stream, .. } if !(0.0..=1.0).contains(&stream) => {
                range("reconstruct_stream", stream, "between 0 and 1")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn take(params: Value) -> (Map<String, Value>, Result<Option<Options>, OptionsError>) {
        let Value::Object(mut params) = params else { panic!("an object") };
        let options = Options::take(&mut params);
        (params, options)
    }

    #[test]
    fn options_leave_the_methods_own_parameters_behind() {
        let (rest, options) = take(json!({ "damping": 0.1, "reconstruct": "submodule", "reconstruct_epochs": 3 }));
        let options = options.unwrap().unwrap();
        assert_eq!((options.epochs, options.batch), (3, default_batch()));
        assert_eq!(rest.keys().collect::<Vec<_>>(), ["damping"]);
        let (_, again) = take(Value::Object(options.filled()));
        assert_eq!(again.unwrap(), Some(options));
        assert_eq!(take(json!({ "damping": 0.1 })).1.unwrap(), None);
    }

    #[test]
    fn what_cannot_be_taken_is_refused_by_key() {
        for (params, key) in [
            (json!({ "reconstruct": "block" }), "block"),
            (json!({ "reconstruct": "submodule", "reconstruct_epoch": 3 }), "reconstruct_epoch"),
            (json!({ "reconstruct_epochs": 3 }), "reconstruct_epochs"),
            (json!({ "reconstruct": "submodule", "reconstruct_batch": 0 }), "reconstruct_batch"),
            (json!({ "reconstruct": "submodule", "reconstruct_learning_rate": -1.0 }), "reconstruct_learning_rate"),
            (json!({ "reconstruct": "submodule", "reconstruct_stream": 1.5 }), "reconstruct_stream"),
        ] {
            let error = take(params).1.unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            assert!(format!("{error} {source}").contains(key), "{error}: {source}");
        }
    }
}
