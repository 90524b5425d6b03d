//! The one loader of configuration: defaults < file < `ESPALIER__SECTION__KEY` in the environment < flags.
//!
//! An unknown key anywhere is an error that names the nearest known one. Sections of the other programs may stand in the
//! same environment, because a launcher's children inherit it.

mod explain;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::{Config, Environment, File, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::checkpoint::hub::{self, HubSettings};
use crate::checkpoint::{self, Checkpoint, CheckpointError, SafetensorsCheckpoint, Target};
use crate::fault::FaultClass;
use crate::store::{self, BlobStore, StoreError, StoreSettings};

pub use explain::{Origin, Setting, reference};

/// Prefix of every environment variable that is read.
pub const ENV_PREFIX: &str = "ESPALIER";

/// Top-level sections of all the programs and of a job; in the environment, those of another program are passed over.
const SECTIONS: [&str; 15] = [
    "coordinator",
    "worker",
    "log",
    "tls",
    "auth",
    "client",
    "http",
    "trace",
    "model",
    "calibration",
    "method",
    "pattern",
    "propagation",
    "output",
    "evaluation",
];
/// How many of [`SECTIONS`] are not a job's.
const PROGRAM_SECTIONS: usize = 8;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// A key that nobody knows.
    #[error("{origin}: unknown key {key}{}", did_you_mean(nearest.as_deref()))]
    UnknownKey {
        /// The file, or the environment.
        origin: String,
        /// The key, dotted.
        key: String,
        /// The known key most like it.
        nearest: Option<String>,
    },
    /// Not the syntax, or not the type.
    #[error("{origin}: {reason}")]
    Invalid {
        /// The file, or what else was being read.
        origin: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ConfigError {
    /// What may be done about it: nothing but correcting the configuration.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Io { .. } | Self::UnknownKey { .. } | Self::Invalid { .. } => FaultClass::Reject,
        }
    }
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|known| format!(" (did you mean {known}?)")).unwrap_or_default()
}

/// Values that flags put on top of everything else.
#[derive(Debug, Clone, Default)]
pub struct Overrides(Vec<(String, Value)>);

impl Overrides {
    /// Sets a dotted key, if the flag was given.
    #[must_use]
    pub fn set<V: Into<Value>>(mut self, key: &str, value: Option<V>) -> Self {
        self.0.extend(value.map(|value| (key.to_owned(), value.into())));
        self
    }
}

/// Loads a configuration. Every key that `T` knows must be there when `T::default()` is serialised.
///
/// # Errors
/// See [`ConfigError`].
pub fn load<T>(file: Option<&Path>, prefix: &str, overrides: Overrides) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    load_from(file, prefix, variables(), overrides)
}

/// Every variable of the environment that is text.
fn variables() -> HashMap<String, String> {
    std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?))).collect()
}

/// [`load`], and where each key has its value from.
///
/// # Errors
/// See [`ConfigError`].
pub fn explain<T>(file: Option<&Path>, prefix: &str, overrides: Overrides) -> Result<(T, Vec<Setting>), ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    explain_from(file, prefix, variables(), overrides)
}

/// [`explain`] with an environment of the caller's choice.
fn explain_from<T>(
    file: Option<&Path>,
    prefix: &str,
    environment: HashMap<String, String>,
    overrides: Overrides,
) -> Result<(T, Vec<Setting>), ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let config: T = load_from(file, prefix, environment.clone(), overrides.clone())?;
    let invalid = |reason: String| ConfigError::Invalid { origin: "configuration".to_owned(), reason };
    let plain = |layer: Config| -> Result<serde_json::Value, ConfigError> {
        layer.try_deserialize().map_err(|error| invalid(error.to_string()))
    };
    let merged = serde_json::to_value(&config).map_err(|error| invalid(error.to_string()))?;
    let file = file.map(|path| {
        let layer =
            Config::builder().add_source(File::from(path)).build().map_err(|error| invalid(error.to_string()))?;
        Ok((path.display().to_string(), plain(layer)?))
    });
    let file = file.transpose()?;
    let environment = environment_layer(prefix, environment).map_err(|error| invalid(error.to_string()))?;
    let layers = explain::Layers {
        merged: &merged,
        file: file.as_ref().map(|(path, layer)| (path.as_str(), layer.clone())),
        environment: plain(environment)?,
        prefix,
        flags: overrides.0.iter().map(|(key, _)| key.as_str()).collect(),
    };
    let settings = layers.settings();
    Ok((config, settings))
}

/// [`load`] with an environment of the caller's choice.
fn load_from<T>(
    file: Option<&Path>,
    prefix: &str,
    environment: HashMap<String, String>,
    overrides: Overrides,
) -> Result<T, ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let failed = |origin: &str| {
        let origin = origin.to_owned();
        move |error: config::ConfigError| ConfigError::Invalid { origin, reason: error.to_string() }
    };
    let defaults = Config::try_from(&T::default()).map_err(failed("defaults"))?;
    let known = serde_json::to_value(T::default())
        .map_err(|error| ConfigError::Invalid { origin: "defaults".to_owned(), reason: error.to_string() })?;
    let mut builder = Config::builder().add_source(defaults);
    let mut origin = "configuration".to_owned();
    if let Some(path) = file {
        // `config` would only say "not found".
        std::fs::metadata(path).map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
        origin = path.display().to_string();
        let layer = Config::builder().add_source(File::from(path)).build().map_err(failed(&origin))?;
        refuse_unknown(&layer, &known, &origin, &[])?;
        builder = builder.add_source(layer);
    }
    let layer = environment_layer(prefix, environment).map_err(failed("environment"))?;
    refuse_unknown(&layer, &known, "environment", &SECTIONS)?;
    builder = builder.add_source(own_sections(&layer, &known).map_err(failed("environment"))?);
    for (key, value) in overrides.0 {
        builder = builder.set_override(&key, value).map_err(failed(&origin))?;
    }
    builder.build().and_then(Config::try_deserialize).map_err(failed(&origin))
}

fn environment_layer(prefix: &str, environment: HashMap<String, String>) -> Result<Config, config::ConfigError> {
    let environment = Environment::with_prefix(prefix)
        .prefix_separator("__")
        .separator("__")
        .try_parsing(true)
        .source(Some(environment.into_iter().collect()));
    Config::builder().add_source(environment).build()
}

/// What the environment says of a job, `ESPALIER__PATTERN__SPARSITY=0.7`: by section and key. A job's own reader knows its
/// keys; sections of programs are passed over.
///
/// # Errors
/// `UnknownKey` for a section that nobody knows.
pub fn job_environment() -> Result<serde_json::Map<String, serde_json::Value>, ConfigError> {
    job_sections(variables())
}

fn job_sections(
    environment: HashMap<String, String>,
) -> Result<serde_json::Map<String, serde_json::Value>, ConfigError> {
    let origin = "environment".to_owned();
    let table: serde_json::Map<String, serde_json::Value> = environment_layer(ENV_PREFIX, environment)
        .and_then(Config::try_deserialize)
        .map_err(|error| ConfigError::Invalid { origin: origin.clone(), reason: error.to_string() })?;
    if let Some(key) = table.keys().find(|key| !SECTIONS.contains(&key.as_str())) {
        let nearest = nearest(key, SECTIONS).map(str::to_owned);
        return Err(ConfigError::UnknownKey { origin, key: key.clone(), nearest });
    }
    let of_job = |section: &str| SECTIONS[PROGRAM_SECTIONS..].contains(&section);
    Ok(table.into_iter().filter(|(section, _)| of_job(section)).collect())
}

/// The part of a layer whose top-level sections `known` has.
fn own_sections(layer: &Config, known: &serde_json::Value) -> Result<Config, config::ConfigError> {
    let table: serde_json::Map<String, serde_json::Value> = layer.clone().try_deserialize()?;
    let own: serde_json::Map<_, _> = table.into_iter().filter(|(section, _)| known.get(section).is_some()).collect();
    Config::try_from(&own)
}

/// Refuses the first key of a layer that `known` lacks; top-level sections in `foreign` are somebody else's.
fn refuse_unknown(
    layer: &Config,
    known: &serde_json::Value,
    origin: &str,
    foreign: &[&str],
) -> Result<(), ConfigError> {
    let table: serde_json::Value = layer
        .clone()
        .try_deserialize()
        .map_err(|error| ConfigError::Invalid { origin: origin.to_owned(), reason: error.to_string() })?;
    let Some(key) = first_unknown(&table, known, "", foreign) else { return Ok(()) };
    let (section, name) = key.rsplit_once('.').unwrap_or(("", &key));
    let siblings = section.split('.').filter(|part| !part.is_empty()).try_fold(known, |at, part| at.get(part));
    let names = siblings.and_then(serde_json::Value::as_object).into_iter().flat_map(serde_json::Map::keys);
    let nearest = nearest(name, names.map(String::as_str));
    Err(ConfigError::UnknownKey { origin: origin.to_owned(), nearest: nearest.map(str::to_owned), key })
}

fn first_unknown(layer: &serde_json::Value, known: &serde_json::Value, path: &str, foreign: &[&str]) -> Option<String> {
    let (Some(layer), Some(known)) = (layer.as_object(), known.as_object()) else { return None };
    layer.iter().find_map(|(key, value)| {
        let dotted = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match known.get(key) {
            Some(below) => first_unknown(value, below, &dotted, &[]),
            None => (!foreign.contains(&key.as_str())).then_some(dotted),
        }
    })
}

/// Finds what a source names (a path, `file://`, `hf://org/name[@revision]`), with the hub as the environment sets it.
///
/// # Errors
/// See [`hub::resolve`].
pub fn locate(source: &str) -> Result<PathBuf, CheckpointError> {
    hub::resolve(source, &HubSettings::from_variables(|key| std::env::var(key).ok()))
}

/// A text on this machine's disk; if it was copied here, the copy goes with this value.
#[derive(Debug)]
pub struct TextFile {
    path: PathBuf,
    _copy: Option<tempfile::TempDir>,
}

impl TextFile {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Finds the text that a source names: what [`locate`] finds, or an object in an object store, which is copied here.
///
/// # Errors
/// See [`locate`] and [`store::copy_here`].
pub fn open_text(source: &str) -> Result<TextFile, CheckpointError> {
    if !store::is_object_url(source) {
        return Ok(TextFile { path: locate(source)?, _copy: None });
    }
    let folder = tempfile::tempdir().map_err(|source| CheckpointError::Io { path: std::env::temp_dir(), source })?;
    let path = store::copy_here(source, &store_settings(), folder.path()).map_err(|error| match error {
        // A text that is not there is a wrong job, as it is on a disk.
        StoreError::NotFound { .. } => CheckpointError::NotFound { path: source.into() },
        other => other.into(),
    })?;
    Ok(TextFile { path, _copy: Some(folder) })
}

/// Opens the model that a source names: what [`locate`] finds, or a checkpoint in an object store, read by range.
///
/// # Errors
/// See [`checkpoint::open`], [`hub::resolve`] and [`store::open`].
pub fn open_model(source: &str) -> Result<Arc<dyn Checkpoint>, CheckpointError> {
    open_model_pinned(source).map(|(checkpoint, _)| checkpoint)
}

/// [`open_model`], and the source by which every other machine finds the same files, see [`hub::pinned`].
///
/// # Errors
/// See [`open_model`].
pub fn open_model_pinned(source: &str) -> Result<(Arc<dyn Checkpoint>, String), CheckpointError> {
    if store::is_object_url(source) {
        let checkpoint = SafetensorsCheckpoint::open_in_store(open_store(source)?)?;
        return Ok((Arc::new(checkpoint), source.to_owned()));
    }
    let path = locate(source)?;
    Ok((checkpoint::open(&path)?, hub::pinned(source, &path)))
}

/// Opens the store that a URL names, reached as the environment says.
///
/// # Errors
/// See [`store::open`].
pub fn open_store(url: &str) -> Result<Arc<dyn BlobStore>, StoreError> {
    store::open(url, &store_settings())
}

/// Reads where a checkpoint is to be written, reached as the environment says.
///
/// # Errors
/// See [`Target::parse`].
pub fn output_target(uri: &str) -> Result<Target, CheckpointError> {
    Target::parse(uri, &store_settings())
}

/// What the environment says of object stores.
pub fn store_settings() -> StoreSettings {
    StoreSettings::from_variables(variables())
}

/// Reads one TOML document (a `job.toml`) with no layers below or above it.
///
/// # Errors
/// `Io`, `Invalid`; an unknown key is told with the nearest known one.
pub fn load_document<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Io { path: path.to_owned(), source })?;
    parse_document(&path.display().to_string(), &text)
}

/// [`load_document`] of a text that was read already; `origin` names it in errors.
///
/// # Errors
/// `Invalid`.
pub fn parse_document<T: DeserializeOwned>(origin: &str, text: &str) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|error| {
        let line = error.span().map(|span| 1 + text[..span.start].matches('\n').count());
        let place = line.map(|line| format!(":{line}")).unwrap_or_default();
        ConfigError::Invalid { origin: format!("{origin}{place}"), reason: suggest(error.message()) }
    })
}

/// Adds the nearest known name to serde's "unknown field" message, and leaves any other message as it is.
pub fn suggest(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let unknown = message.contains("unknown field").then(|| quoted.next()).flatten();
    let nearest = unknown.and_then(|unknown| nearest(unknown, quoted));
    format!("{message}{}", did_you_mean(nearest))
}

/// The candidate most like `name`, if any is like it at all.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Below this, a suggestion would be a guess.
    const ALIKE: f64 = 0.7;
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> HashMap<String, String> {
        variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_jobs_sections_are_read_from_the_environment_and_others_passed_over() {
        let found = job_sections(environment(&[
            ("ESPALIER__PATTERN__SPARSITY", "0.7"),
            ("ESPALIER__METHOD__NAME", "wanda"),
            ("ESPALIER__CALIBRATION__SAMPLES", "16"),
            ("ESPALIER__WORKER__THREADS", "3"),
            ("ESPALIER__HTTP__LISTEN", "127.0.0.1:0"),
            ("ESPALIER__TRACE__ENDPOINT", "http://127.0.0.1:4317"),
            ("PATH", "/bin"),
        ]))
        .unwrap();
        let expected = serde_json::json!({
            "pattern": { "sparsity": 0.7 }, "method": { "name": "wanda" }, "calibration": { "samples": 16 }
        });
        assert_eq!(serde_json::Value::Object(found), expected);
        let error = job_sections(environment(&[("ESPALIER__PATERN__SPARSITY", "0.7")])).unwrap_err();
        assert!(error.to_string().contains("did you mean pattern?"), "{error}");
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        worker: Section,
    }

    /// A worker.
    #[derive(Debug, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
    #[serde(deny_unknown_fields, default)]
    struct Section {
        /// Compute
        /// threads.
        threads: usize,
        /// A name.
        name: Option<String>,
        /// Where.
        listen: String,
    }

    impl Default for Section {
        fn default() -> Self {
            Self { threads: 1, name: None, listen: "127.0.0.1:0".to_owned() }
        }
    }

    fn load_with(file: &str, env: &[(&str, &str)], overrides: Overrides) -> Result<Settings, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, file).unwrap();
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        load_from(Some(&path), ENV_PREFIX, env, overrides)
    }

    #[test]
    fn every_key_says_where_its_value_is_from_and_no_url_shows_a_password() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, "[worker]\nthreads = 2\nlisten = \"https://bob:hunter2@host:1\"").unwrap();
        let environment = environment(&[("ESPALIER__WORKER__THREADS", "3"), ("ESPALIER__COORDINATOR__RUNS", "r")]);
        let told =
            |overrides| explain_from::<Settings>(Some(&path), ENV_PREFIX, environment.clone(), overrides).unwrap().1;
        let setting =
            |key: &str, value: serde_json::Value, origin| Setting { key: format!("worker.{key}"), value, origin };
        let expected = [
            setting("threads", 3.into(), Origin::Environment("ESPALIER__WORKER__THREADS".to_owned())),
            setting("name", serde_json::Value::Null, Origin::Default),
            setting("listen", "https://host:1".into(), Origin::File(path.display().to_string())),
        ];
        assert_eq!(told(Overrides::default()), expected);
        let flags = Overrides::default().set("worker.threads", Some(4_i64));
        assert_eq!(told(flags)[0], setting("threads", 4.into(), Origin::Flag));
    }

    #[test]
    fn the_reference_has_every_key_with_its_meaning() {
        let text = reference::<Settings>();
        assert!(text.contains("### `[worker]`\n\nA worker.\n"), "{text}");
        assert!(text.contains("| `threads` | `1` | Compute threads. |\n| `name` |  | A name. |\n"), "{text}");
    }

    #[test]
    fn flags_beat_the_environment_which_beats_the_file_which_beats_defaults() {
        let file = "[worker]\nthreads = 2\nname = \"file\"";
        let env = [("ESPALIER__WORKER__THREADS", "3"), ("ESPALIER__WORKER__NAME", "env"), ("PATH", "/bin")];
        let settings = load_with(file, &env, Overrides::default().set("worker.threads", Some(4_i64))).unwrap();
        let section = Section { threads: 4, name: Some("env".to_owned()), listen: "127.0.0.1:0".to_owned() };
        assert_eq!(settings, Settings { worker: section });
    }

    #[test]
    fn unknown_keys_name_the_nearest_known_one() {
        let error = load_with("[worker]\nthraeds = 2", &[], Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("worker.thraeds") && error.contains("did you mean threads?"), "{error}");
        let env = [("ESPALIER__WROKER__THREADS", "3")];
        let error = load_with("", &env, Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("environment") && error.contains("did you mean worker?"), "{error}");
    }

    #[test]
    fn sections_of_other_programs_may_stand_in_the_environment() {
        let env = [("ESPALIER__COORDINATOR__LISTEN", "x")];
        assert_eq!(load_with("", &env, Overrides::default()).unwrap(), Settings::default());
    }

    #[test]
    fn a_missing_file_and_a_wrong_type_are_told_with_the_file() {
        let missing = load::<Settings>(Some(Path::new("/no/such.toml")), ENV_PREFIX, Overrides::default());
        assert!(missing.unwrap_err().to_string().contains("/no/such.toml"));
        let error = load_with("[worker]\nthreads = \"many\"", &[], Overrides::default()).unwrap_err().to_string();
        assert!(error.contains("worker.toml") && error.contains("threads"), "{error}");
    }

    #[test]
    fn a_document_tells_line_and_nearest_key() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, "[worker]\nlistn = \"x\"").unwrap();
        let error = load_document::<Settings>(&path).unwrap_err().to_string();
        assert!(error.contains("job.toml:2") && error.contains("did you mean listen?"), "{error}");
    }
}
