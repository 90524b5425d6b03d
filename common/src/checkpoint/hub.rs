//! Where a model comes from: a path, a `file://` URL, or the Hugging Face hub and its cache.

use std::fmt;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::CheckpointError;
use super::companion::is_companion;
use super::folder::Folder;
use super::index::{INDEX_FILE, Index, SINGLE_FILE};
use crate::store::local_path;

const SCHEME: &str = "hf://";
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
/// How often a broken download is taken up again where it broke off.
const RETRIES: usize = 3;

/// How the hub is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// The cache's directory, laid out as by `huggingface_hub`.
    pub cache: PathBuf,
    /// Access token; never shown.
    pub token: Option<String>,
    /// Base URL of the hub.
    pub endpoint: String,
    /// Use the cache alone.
    pub offline: bool,
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("cache", &self.cache)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("endpoint", &self.endpoint)
            .field("offline", &self.offline)
            .finish()
    }
}

impl HubSettings {
    /// Reads the variables that `huggingface_hub` reads: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`,
    /// `HF_ENDPOINT`, `HF_HUB_OFFLINE` and, for the default home, `HOME`. `lookup` gives a variable's value.
    pub fn from_variables(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let given = |key: &str| lookup(key).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let home = given("HF_HOME").map_or_else(
            || Path::new(&given("HOME").unwrap_or_else(|| ".".to_owned())).join(".cache/huggingface"),
            PathBuf::from,
        );
        let token_path = given("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let stored_token = || std::fs::read_to_string(token_path).ok().map(|token| token.trim().to_owned());
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Self {
            cache: given("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            token: given("HF_TOKEN").or_else(stored_token).filter(|token| !token.is_empty()),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            offline: given("HF_HUB_OFFLINE")
                .is_some_and(|value| matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "yes" | "on")),
        }
    }
}

/// Finds the directory or file that a model source names: a path, a `file://` URL, or `hf://org/name[@revision]`, which is
/// downloaded to the cache unless it is there. From the hub come config, safetensors with their index, and companion files;
/// no other weights.
///
/// # Errors
/// `BadSource` for what is none of these, `NotFound`, and `Hub` if the hub or, offline, the cache does not have it.
pub fn resolve(source: &str, settings: &HubSettings) -> Result<PathBuf, CheckpointError> {
    let bad = |problem| CheckpointError::BadSource { source_name: source.to_owned(), problem };
    let path = match source.split_once("://") {
        None if source.is_empty() => return Err(bad("it is empty")),
        None => PathBuf::from(source),
        Some(("file", _)) => local_path(source).map_err(|_| bad("it has no absolute path"))?,
        Some(("hf", _)) => return Model::parse(source)?.locate(settings),
        Some(_) => return Err(bad("give a path, file:// or hf://org/name[@revision]")),
    };
    if path.exists() {
        return Ok(path);
    }
    Err(CheckpointError::NotFound { path })
}

/// A source as [`resolve`] found it: a model of the hub by its commit, so that whoever resolves it later, on whichever machine,
/// gets the same files even if its branch has moved. Any other source as it is.
pub fn pinned(source: &str, found: &Path) -> String {
    let snapshot = found.parent().and_then(Path::file_name).is_some_and(|folder| folder == "snapshots");
    let commit = found.file_name().and_then(|commit| commit.to_str()).filter(|_| snapshot);
    match (source.strip_prefix(SCHEME), commit) {
        (Some(rest), Some(commit)) => format!("{SCHEME}{}@{commit}", rest.split('@').next().unwrap_or(rest)),
        _ => source.to_owned(),
    }
}

/// A model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    /// `org/name`.
    id: String,
    /// A branch, a tag or a commit.
    revision: String,
}

impl Model {
    fn parse(source: &str) -> Result<Self, CheckpointError> {
        let bad = |problem| CheckpointError::BadSource { source_name: source.to_owned(), problem };
        let rest = source.strip_prefix(SCHEME).unwrap_or(source);
        let (id, revision) = rest.split_once('@').unwrap_or((rest, DEFAULT_REVISION));
        let plain = |part: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            !matches!(part, "" | "." | "..") && part.chars().all(legal)
        };
        if !id.split('/').all(plain) || id.split('/').count() != 2 {
            return Err(bad("a model of the hub is named hf://org/name[@revision]"));
        }
        if !revision.split('/').all(plain) {
            return Err(bad("its revision is no name of a branch, tag or commit"));
        }
        Ok(Self { id: id.to_owned(), revision: revision.to_owned() })
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.clone(), RepoType::Model, revision.to_owned())
    }

    fn locate(&self, settings: &HubSettings) -> Result<PathBuf, CheckpointError> {
        let cache = std::path::absolute(&settings.cache)
            .map_err(|source| CheckpointError::Io { path: settings.cache.clone(), source })?;
        let cache = Cache::new(cache);
        if settings.offline {
            return self.cached(&cache);
        }
        self.downloaded(&cache, settings)
    }

    /// Finds the model's snapshot in the cache.
    fn cached(&self, cache: &Cache) -> Result<PathBuf, CheckpointError> {
        let absent = |file: &str| CheckpointError::Hub {
            source_name: self.to_string(),
            file: file.to_owned(),
            reason: format!("offline mode is on, and it is not in the cache {}", cache.path().display()),
            transient: false,
        };
        let repo = cache.repo(self.repo(&self.revision));
        // A commit may be there without a reference of its own name.
        let by_commit = repo.pointer_path(&self.revision).join("config.json");
        let config = repo.get("config.json").or_else(|| by_commit.exists().then_some(by_commit));
        let directory = config.as_deref().and_then(Path::parent).ok_or_else(|| absent("config.json"))?;
        if directory.join(SINGLE_FILE).exists() {
            return Ok(directory.to_owned());
        }
        if !directory.join(INDEX_FILE).exists() {
            return Err(absent(SINGLE_FILE));
        }
        match Index::read(&Folder::Disk(directory.to_owned())) {
            Err(CheckpointError::MissingShard { shard, .. }) => Err(absent(&shard)),
            Err(error) => Err(error),
            Ok(_) => Ok(directory.to_owned()),
        }
    }

    /// Downloads what the cache lacks.
    fn downloaded(&self, cache: &Cache, settings: &HubSettings) -> Result<PathBuf, CheckpointError> {
        if !settings.endpoint.starts_with("http://") && !settings.endpoint.starts_with("https://") {
            let problem = "the hub's endpoint is not an http:// or https:// URL";
            return Err(CheckpointError::BadSource { source_name: self.to_string(), problem });
        }
        let failed = |file: &str, error: &ApiError| self.failed(file, error, settings);
        let api: Api = ApiBuilder::from_cache(cache.clone())
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .build()
            .map_err(|error| failed("the list of files", &error))?;
        let listed = api.repo(self.repo(&self.revision)).info().map_err(|error| failed("the list of files", &error))?;
        if listed.sha.is_empty() || !listed.sha.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(self.unusable("the list of files", "the hub did not say which commit it is of"));
        }
        // All files are of this commit, whatever happens to the branch meanwhile.
        let pinned = api.repo(self.repo(&listed.sha));
        let names: Vec<&str> = listed.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let fetch = |file: &str| self.fetch(&pinned, file, settings);
        let directory = fetch("config.json")?.parent().map(Path::to_owned);
        let directory = directory.ok_or_else(|| self.unusable("config.json", "the cache has no directory for it"))?;
        if names.contains(&SINGLE_FILE) {
            fetch(SINGLE_FILE)?;
        } else if names.contains(&INDEX_FILE) {
            fetch(INDEX_FILE)?;
            for shard in Index::shard_names(&Folder::Disk(directory.clone()))? {
                fetch(&shard)?;
            }
        } else {
            return Err(self.unusable(SINGLE_FILE, "the model has no safetensors"));
        }
        for name in names.iter().filter(|name| !name.contains('/') && is_companion(name)) {
            fetch(name)?;
        }
        let named = cache.repo(self.repo(&self.revision)).create_ref(&listed.sha);
        named.map_err(|source| CheckpointError::Io { path: cache.path().clone(), source })?;
        Ok(directory)
    }

    fn fetch(&self, repo: &ApiRepo, file: &str, settings: &HubSettings) -> Result<PathBuf, CheckpointError> {
        repo.get(file).map_err(|error| self.failed(file, &error, settings))
    }

    fn unusable(&self, file: &str, reason: &str) -> CheckpointError {
        let (source_name, file, reason) = (self.to_string(), file.to_owned(), reason.to_owned());
        CheckpointError::Hub { source_name, file, reason, transient: false }
    }

    fn failed(&self, file: &str, error: &ApiError, settings: &HubSettings) -> CheckpointError {
        let mut reason = error.to_string();
        if let Some(token) = &settings.token {
            reason = reason.replace(token, "(hidden)");
        }
        // The client's own error type is not exported; its text is. Refusals do not heal, except too many requests.
        let refused = reason.contains("status: 4") && !reason.contains("status: 429");
        if reason.contains("status: 401") || reason.contains("status: 403") {
            reason.push_str(match settings.token {
                Some(_) => " (the token does not give access to it)",
                None => " (is it private? set HF_TOKEN)",
            });
        }
        let (source_name, file) = (self.to_string(), file.to_owned());
        CheckpointError::Hub { source_name, file, reason, transient: !refused }
    }
}

impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}@{}", self.id, self.revision)
    }
}
