//! Reading `config.json`: every refusal names the key.

use serde_json::Value;

use super::ModelError;

/// No dimension of any model comes near; products of two of them stay far from overflowing.
const LARGEST_DIMENSION: u64 = 1 << 24;

/// Far beyond any model, and few enough to list.
const MOST_LAYERS: usize = 1 << 14;

/// An object of `config.json` (the whole of it, or one nested in it).
#[derive(Debug, Clone, Copy)]
pub(super) struct Config<'a> {
    path: &'a str,
    values: &'a Value,
}

impl<'a> Config<'a> {
    pub(super) fn new(path: &'a str, values: &'a Value) -> Self {
        Self { path, values }
    }

    /// Another object of the same file.
    pub(super) fn of<'b>(&self, values: &'b Value) -> Config<'b>
    where
        'a: 'b,
    {
        Config { path: self.path, values }
    }

    /// An error about `key`.
    pub(super) fn refuse(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::Config { path: self.path.to_owned(), key: key.to_owned(), reason: reason.into() }
    }

    /// The value of `key`; `null` counts as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    /// The object under `key`.
    pub(super) fn object(&self, key: &str) -> Result<Option<Config<'a>>, ModelError> {
        match self.get(key) {
            None => Ok(None),
            Some(values) if values.is_object() => Ok(Some(Config { path: self.path, values })),
            Some(other) => Err(self.refuse(key, format!("{other} is not an object"))),
        }
    }

    /// A dimension that may be absent: from 1 to [`LARGEST_DIMENSION`].
    pub(super) fn dimension_if_any(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64() {
            Some(found @ 1..=LARGEST_DIMENSION) => {
                Ok(Some(usize::try_from(found).expect("the largest dimension fits in 32 bits")))
            }
            _ => Err(self.refuse(key, format!("{value} is not an integer from 1 to {LARGEST_DIMENSION}"))),
        }
    }

    /// A dimension that must be there.
    pub(super) fn dimension(&self, key: &str) -> Result<usize, ModelError> {
        self.dimension_if_any(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    /// Number of decoder layers.
    pub(super) fn layers(&self) -> Result<usize, ModelError> {
        let layers = self.dimension("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            return Err(self.refuse("num_hidden_layers", format!("{layers} is more than {MOST_LAYERS}")));
        }
        Ok(layers)
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.refuse(key, format!("{value} is neither true nor false")))
    }

    /// A finite number above zero that may be absent.
    pub(super) fn positive_if_any(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(found) if found.is_finite() && found > 0.0 => Ok(Some(found)),
            _ => Err(self.refuse(key, format!("{value} is not a finite number above zero"))),
        }
    }

    /// A finite number above zero that must be there.
    pub(super) fn positive(&self, key: &str) -> Result<f64, ModelError> {
        self.positive_if_any(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.refuse(key, format!("{value} is not a string")))
    }

    /// Width of one head: `divided` ÷ `heads`, which must come out even.
    pub(super) fn head_width(&self, hidden: usize, heads: usize) -> Result<usize, ModelError> {
        if !hidden.is_multiple_of(heads) {
            let reason = format!("{hidden} is not a multiple of num_attention_heads = {heads}");
            return Err(self.refuse("hidden_size", reason));
        }
        Ok(hidden / heads)
    }
}
