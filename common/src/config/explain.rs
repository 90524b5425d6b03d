//! Where each key of a configuration has its value from, and what each key means.

use std::fmt;
use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::store;

/// What gave a key its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "from", content = "name")]
pub enum Origin {
    /// Nobody: it is as it is unless somebody says otherwise.
    Default,
    /// The file of this name.
    File(String),
    /// The environment variable of this name.
    Environment(String),
    /// A flag.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) => f.write_str(path),
            Self::Environment(variable) => f.write_str(variable),
            Self::Flag => f.write_str("flag"),
        }
    }
}

/// One key of a configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Setting {
    /// Section and key, dotted.
    pub key: String,
    /// Its value; null if it has none. Without secrets.
    pub value: Value,
    /// What gave it.
    pub origin: Origin,
}

impl Setting {
    /// The value as it would stand in a file; nothing if there is none.
    pub fn text(&self) -> String {
        match &self.value {
            Value::Null => String::new(),
            value => value.to_string(),
        }
    }
}

/// The layers of a configuration, as plain data, and where each came from.
pub(super) struct Layers<'a> {
    pub(super) merged: &'a Value,
    pub(super) file: Option<(&'a str, Value)>,
    pub(super) environment: Value,
    pub(super) prefix: &'a str,
    pub(super) flags: Vec<&'a str>,
}

impl Layers<'_> {
    /// Every key of the merged configuration.
    pub(super) fn settings(&self) -> Vec<Setting> {
        let sections = self.merged.as_object().into_iter().flatten();
        let keys = sections.flat_map(|(section, keys)| {
            keys.as_object().into_iter().flatten().map(move |(key, value)| (section.as_str(), key.as_str(), value))
        });
        keys.map(|(section, key, value)| Setting {
            key: format!("{section}.{key}"),
            value: without_secrets(value),
            origin: self.origin(section, key),
        })
        .collect()
    }

    fn origin(&self, section: &str, key: &str) -> Origin {
        let has = |layer: &Value| layer.get(section).and_then(|section| section.get(key)).is_some();
        if self.flags.contains(&format!("{section}.{key}").as_str()) {
            return Origin::Flag;
        }
        if has(&self.environment) {
            let variable = format!("{}__{section}__{key}", self.prefix);
            return Origin::Environment(variable.to_ascii_uppercase());
        }
        match &self.file {
            Some((path, layer)) if has(layer) => Origin::File((*path).to_owned()),
            _ => Origin::Default,
        }
    }
}

/// Keys hold paths of secrets and never secrets; but a URL may, if somebody wrote them into one.
fn without_secrets(value: &Value) -> Value {
    match value {
        Value::String(text) if text.contains("://") => Value::String(store::without_secrets(text)),
        other => other.clone(),
    }
}

/// Every key of a configuration with its meaning and default, as a table of Markdown for each section.
pub fn reference<T: JsonSchema + Default + Serialize>() -> String {
    let schema = schemars::schema_for!(T).to_value();
    let defaults = serde_json::to_value(T::default()).expect("a configuration is plain data");
    let empty = Map::new();
    let mut text = String::new();
    for (section, keys) in defaults.as_object().unwrap_or(&empty) {
        let described = resolved(&schema, &schema["properties"][section]);
        let _ = write!(text, "\n### `[{section}]`\n\n");
        if let Some(about) = description(&schema["properties"][section]).or_else(|| description(described)) {
            let _ = write!(text, "{about}\n\n");
        }
        text.push_str("| key | default | meaning |\n|---|---|---|\n");
        for (key, default) in keys.as_object().unwrap_or(&empty) {
            let property = &described["properties"][key];
            let about = description(property).or_else(|| description(resolved(&schema, property))).unwrap_or_default();
            let choices = choices(resolved(&schema, property));
            let default = if default.is_null() { String::new() } else { format!("`{default}`") };
            let _ = writeln!(text, "| `{key}` | {default} | {about}{choices} |");
        }
    }
    text
}

fn resolved<'a>(schema: &'a Value, property: &'a Value) -> &'a Value {
    let name = property["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/"));
    name.map_or(property, |name| &schema["$defs"][name])
}

/// In one line, for a table.
fn description(property: &Value) -> Option<String> {
    let text = property["description"].as_str()?.replace('\n', " ").replace('|', "\\|");
    // Links between items of the code lead nowhere here.
    Some(text.replace("[`", "`").replace("`]", "`"))
}

/// The values of a key that takes a few only.
fn choices(property: &Value) -> String {
    let listed = property["oneOf"].as_array().or_else(|| property["enum"].as_array());
    let one = |choice: &Value| {
        Some(format!("`{}`", choice.get("const").unwrap_or(choice).as_str().map(|c| format!("\"{c}\""))?))
    };
    let all: Vec<_> = listed.into_iter().flatten().filter_map(one).collect();
    if all.is_empty() { String::new() } else { format!(" One of {}.", all.join(", ")) }
}
