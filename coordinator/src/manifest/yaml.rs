//! Documents as plain data and as YAML: keys in the order of their types, texts of several lines as blocks.

use serde::Serialize;
use serde_json::Value;
use yaml_rust2::yaml::Hash;
use yaml_rust2::{Yaml, YamlEmitter, YamlLoader};

/// Documents as plain data, without keys that say nothing.
pub fn values<T: Serialize>(documents: &[T]) -> Vec<Value> {
    let value = |document| said(serde_json::to_value(document).expect("a manifest is plain data"));
    documents.iter().map(value).collect()
}

fn said(value: Value) -> Value {
    match value {
        Value::Array(values) => values.into_iter().map(said).collect(),
        Value::Object(keys) => {
            keys.into_iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (key, said(value))).collect()
        }
        other => other,
    }
}

/// Writes documents one after another.
pub fn stream<T: Serialize>(documents: &[T]) -> String {
    let mut text = String::new();
    for value in values(documents) {
        let mut emitter = YamlEmitter::new(&mut text);
        emitter.multiline_strings(true);
        emitter.dump(&yaml(value)).expect("a string takes all that is written to it");
        text.push('\n');
    }
    text
}

/// Reads one document of ours; nothing for what has a value that JSON has not.
pub(super) fn parse(text: &str) -> Value {
    fn value(yaml: &Yaml) -> Value {
        match yaml {
            Yaml::String(text) => Value::from(text.as_str()),
            Yaml::Integer(number) => Value::from(*number),
            Yaml::Boolean(value) => Value::from(*value),
            Yaml::Array(values) => values.iter().map(value).collect(),
            Yaml::Hash(keys) => {
                keys.iter().filter_map(|(key, of)| Some((key.as_str()?.to_owned(), value(of)))).collect()
            }
            _ => Value::Null,
        }
    }
    YamlLoader::load_from_str(text).ok().and_then(|documents| documents.first().map(value)).unwrap_or_default()
}

fn yaml(value: Value) -> Yaml {
    match value {
        Value::Null => Yaml::Null,
        Value::Bool(value) => Yaml::Boolean(value),
        Value::Number(number) => number.as_i64().map_or_else(|| Yaml::Real(number.to_string()), Yaml::Integer),
        Value::String(text) => Yaml::String(text),
        Value::Array(values) => Yaml::Array(values.into_iter().map(yaml).collect()),
        Value::Object(keys) => {
            Yaml::Hash(keys.into_iter().map(|(key, value)| (Yaml::String(key), yaml(value))).collect::<Hash>())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let tricky =
            ["yes", "null", "0440", "1e3", "a: b", "- x", "", "#", "two\nlines\n", "one\nline", "=", "~", "\"", "*a"];
        let document = serde_json::json!({ "texts": tricky, "none": null, "number": 288, "no": false });
        let read = YamlLoader::load_from_str(&stream(&[&document, &document])).unwrap();
        assert_eq!(read.len(), 2);
        let texts: Vec<_> = read[1]["texts"].as_vec().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
        assert_eq!(texts, tricky);
        assert!(read[0]["none"].is_badvalue());
        assert_eq!((read[0]["number"].as_i64(), read[0]["no"].as_bool()), (Some(288), Some(false)));
    }
}
