//! Tests of the hub against a server of this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use serde_json::json;

use super::hub::{HubSettings, pinned, resolve};
use super::*;
use crate::digest::Digest;
use crate::fault::FaultClass;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_secret";

/// Serves one model to holders of the token.
struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let (path, headers) = request(&stream);
                if path == "/stop" {
                    return;
                }
                log.lock().unwrap().push(path.clone());
                let _ = stream.write_all(&answer(&files, &path, &headers));
            }
        });
        Self { address, requests, thread: Some(thread) }
    }

    fn settings(&self, cache: &Path) -> HubSettings {
        let endpoint = format!("http://{}", self.address);
        HubSettings { cache: cache.to_owned(), token: Some(TOKEN.to_owned()), endpoint, offline: false }
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            TcpStream::connect(self.address).unwrap().write_all(b"GET /stop HTTP/1.1\r\n\r\n").unwrap();
            thread.join().unwrap();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn request(stream: &TcpStream) -> (String, String) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let path = lines.next().unwrap_or_default().split(' ').nth(1).unwrap_or_default().to_owned();
    (path, lines.collect::<Vec<_>>().join("\n").to_ascii_lowercase())
}

fn answer(files: &BTreeMap<String, Vec<u8>>, path: &str, headers: &str) -> Vec<u8> {
    let reply = |status: &str, extra: &str, body: &[u8]| {
        let length = body.len();
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
        [head.as_bytes(), body].concat()
    };
    if !headers.contains(&format!("authorization: bearer {TOKEN}")) {
        return reply("401 Unauthorized", "", b"");
    }
    if path == "/api/models/org/name/revision/main" {
        let siblings: Vec<_> = files.keys().map(|name| json!({ "rfilename": name })).collect();
        return reply("200 OK", "", json!({ "siblings": siblings, "sha": COMMIT }).to_string().as_bytes());
    }
    let name = path.strip_prefix(&format!("/org/name/resolve/{COMMIT}/"));
    let Some(bytes) = name.and_then(|name| files.get(name)) else { return reply("404 Not Found", "", b"") };
    let range = headers.lines().find_map(|line| line.strip_prefix("range: bytes=")).unwrap_or("0-");
    let (start, end) = range.split_once('-').unwrap();
    let start: usize = start.parse().unwrap();
    let end = end.parse().map_or(bytes.len(), |end: usize| (end + 1).min(bytes.len()));
    let extra = format!(
        "ETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {start}-{}/{}\r\n",
        Digest::of(bytes),
        end - 1,
        bytes.len()
    );
    reply("206 Partial Content", &extra, &bytes[start..end])
}

/// A sharded model and files that must not be downloaded.
fn model() -> BTreeMap<String, Vec<u8>> {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("model");
    let header = TensorHeader { dtype: Dtype::F16, shape: vec![3] };
    let plan = vec![("a".to_owned(), header.clone()), ("b".to_owned(), header)];
    let mut writer = CheckpointWriter::create(&target, 6, plan).unwrap();
    writer.write("a", &[1; 6]).unwrap();
    writer.write("b", &[2; 6]).unwrap();
    for name in ["tokenizer.json", "LICENSE", "pytorch_model.bin", "README.md"] {
        writer.add_file(name, name.as_bytes()).unwrap();
    }
    writer.add_file("config.json", b"{}").unwrap();
    let written = writer.finish().unwrap();
    let mut files: BTreeMap<_, _> =
        written.into_iter().map(|file| (file.name.clone(), std::fs::read(target.join(file.name)).unwrap())).collect();
    files.insert("original/tokenizer.model".to_owned(), b"x".to_vec());
    files
}

#[test]
fn model_is_downloaded_once_and_then_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let mut server = Server::start(model());
    let mut settings = server.settings(cache.path());
    let directory = resolve("hf://org/name", &settings).unwrap();
    assert!(directory.ends_with(format!("models--org--name/snapshots/{COMMIT}")));
    let checkpoint = open(&directory).unwrap();
    assert_eq!(checkpoint.read("b").unwrap(), [2; 6]);
    let companions: Vec<_> = checkpoint.companion_files().unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(companions, ["LICENSE", "tokenizer.json"]);
    let downloads = server.requests.lock().unwrap().len();
    for unwanted in ["pytorch_model.bin", "README.md", "original"] {
        assert!(!server.requests.lock().unwrap().iter().any(|path| path.contains(unwanted)), "{unwanted}");
    }

    assert_eq!(resolve("hf://org/name", &settings).unwrap(), directory);
    assert_eq!(server.requests.lock().unwrap().len(), downloads + 1, "only the list of files is asked for again");

    server.stop();
    assert_eq!(resolve("hf://org/name", &settings).unwrap_err().class(), FaultClass::RetryElsewhere);
    settings.offline = true;
    assert_eq!(resolve("hf://org/name", &settings).unwrap(), directory);
    assert_eq!(resolve(&format!("hf://org/name@{COMMIT}"), &settings).unwrap(), directory);
    let error = resolve("hf://org/other", &settings).unwrap_err();
    assert!(error.to_string().starts_with("cannot get config.json of hf://org/other@main: offline mode is on"));
    std::fs::remove_file(directory.join("model-00002-of-00002.safetensors")).unwrap();
    let error = resolve("hf://org/name", &settings).unwrap_err();
    assert!(error.to_string().starts_with("cannot get model-00002-of-00002.safetensors of"), "{error}");
}

#[test]
fn a_model_of_the_hub_is_pinned_by_its_commit() {
    let snapshot = format!("/cache/models--org--name/snapshots/{COMMIT}");
    for source in ["hf://org/name", "hf://org/name@main"] {
        assert_eq!(pinned(source, Path::new(&snapshot)), format!("hf://org/name@{COMMIT}"));
    }
    assert_eq!(pinned("/snapshots/x", Path::new("/snapshots/x")), "/snapshots/x");
}

#[test]
fn refusals_are_final_and_show_no_secret() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(BTreeMap::new());
    let mut settings = server.settings(cache.path());
    let error = resolve("hf://org/absent", &settings).unwrap_err();
    assert!(error.to_string().contains("404"), "{error}");
    assert_eq!(error.class(), FaultClass::Reject);
    settings.token = Some("hf_wrong".to_owned());
    let error = resolve("hf://org/name", &settings).unwrap_err();
    assert!(error.to_string().ends_with("(the token does not give access to it)"), "{error}");
    assert!(!format!("{error} {error:?} {settings:?}").contains("hf_wrong"));
    settings.token = None;
    assert!(resolve("hf://org/name", &settings).unwrap_err().to_string().ends_with("set HF_TOKEN)"));
}

#[test]
fn sources_are_paths_or_urls() {
    let directory = tempfile::tempdir().unwrap();
    let settings = HubSettings::from_variables(|_| None);
    let path = directory.path().join("a model");
    std::fs::create_dir(&path).unwrap();
    let url = format!("file://{}/a%20model", directory.path().display());
    assert_eq!(resolve(&url, &settings).unwrap(), path);
    assert_eq!(resolve(path.to_str().unwrap(), &settings).unwrap(), path);
    assert!(matches!(resolve("nowhere/at/all", &settings), Err(CheckpointError::NotFound { .. })));
    let bad =
        ["", "s3://bucket/x", "file://host/x", "hf://name", "hf://a/b/c", "hf://../x", "hf://a/b@", "hf://a/b@../c"];
    for source in bad {
        let error = resolve(source, &settings).unwrap_err();
        assert!(matches!(error, CheckpointError::BadSource { .. }), "{source}: {error}");
    }
}

#[test]
fn variables_are_those_of_huggingface_hub() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "hf_stored\n").unwrap();
    let base = home.path().display().to_string();
    let settings = |pairs: &[(&str, &str)]| {
        HubSettings::from_variables(|key| {
            pairs.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned())
        })
    };
    let stored = settings(&[("HF_HOME", &base)]);
    assert_eq!(stored.cache, home.path().join("hub"));
    assert_eq!(stored.token.as_deref(), Some("hf_stored"));
    assert_eq!(stored.endpoint, "https://huggingface.co");
    assert!(!stored.offline);
    let given = [("HF_HOME", base.as_str()), ("HF_TOKEN", "hf_given"), ("HF_HUB_CACHE", "/c"), ("HF_HUB_OFFLINE", "1")];
    let given = settings(&[&given[..], &[("HF_ENDPOINT", "http://mirror/")]].concat());
    assert_eq!(given.token.as_deref(), Some("hf_given"));
    assert_eq!((given.cache, given.endpoint.as_str(), given.offline), (PathBuf::from("/c"), "http://mirror", true));
    assert_eq!(settings(&[("HOME", "/h")]).cache, Path::new("/h/.cache/huggingface/hub"));
}
