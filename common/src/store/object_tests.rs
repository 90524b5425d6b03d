//! Tests of the object store against a server of this process that answers as it is told, so that faults fire by count.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use object_store::{BackoffConfig, RetryConfig};

use super::*;
use crate::fault::FaultClass;

/// What a request meets.
#[derive(Clone)]
enum Answer {
    /// A status and a body.
    Status(u16, &'static str),
    /// The connection is closed without a word.
    Cut,
    /// The request is read, and nothing comes back for longer than the client waits.
    Silence,
}

/// Answers the first requests as it is told, and all further ones with the last answer.
struct Server {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    thread: Option<JoinHandle<()>>,
}

/// The client's patience with one request, and what [`Answer::Silence`] outlasts.
const PATIENCE: Duration = Duration::from_millis(300);
const RETRIES: usize = 3;

impl Server {
    fn start(answers: &[Answer]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, mut due) = (Arc::clone(&requests), VecDeque::from(answers.to_vec()));
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let request = read_request(&stream);
                if request.starts_with("STOP") {
                    return;
                }
                log.lock().unwrap().push(request);
                let answer = if due.len() > 1 { due.pop_front() } else { due.front().cloned() };
                match answer.unwrap() {
                    Answer::Status(status, body) => {
                        let head = format!("HTTP/1.1 {status} Told\r\nContent-Length: {}\r\n", body.len());
                        let meta =
                            "ETag: \"1\"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\nConnection: close\r\n\r\n";
                        let _ = stream.write_all([head.as_str(), meta, body].concat().as_bytes());
                    }
                    Answer::Cut => drop(stream),
                    // The client closes the connection when it has waited long enough.
                    Answer::Silence => drop(stream.read(&mut [0])),
                }
            }
        });
        Self { address, requests, thread: Some(thread) }
    }

    fn store(&self) -> ObjectBlobStore {
        store_at(self.address)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        TcpStream::connect(self.address).unwrap().write_all(b"STOP / HTTP/1.1\r\n\r\n").unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Reads a request whole, and returns its first line and its headers.
fn read_request(stream: &TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let mut head = String::new();
    while reader.read_line(&mut head).unwrap_or(0) > 2 {}
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    });
    let mut body = vec![0; length.unwrap_or(0)];
    let _ = reader.read_exact(&mut body);
    head
}

fn store_at(address: SocketAddr) -> ObjectBlobStore {
    let variables = [
        ("AWS_ENDPOINT_URL", format!("http://{address}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "hunter22".to_owned()),
        ("AWS_TIMEOUT", format!("{}ms", PATIENCE.as_millis())),
    ];
    let settings = StoreSettings::from_variables(variables.map(|(name, value)| (name.to_owned(), value)));
    let (step, most) = (Duration::from_millis(1), Duration::from_millis(4));
    let backoff = BackoffConfig { init_backoff: step, max_backoff: most, base: 2.0 };
    let retry = RetryConfig { backoff, max_retries: RETRIES, retry_timeout: Duration::from_secs(20) };
    ObjectBlobStore::open_retrying("s3://bucket/run", &settings, retry).unwrap()
}

#[test]
fn object_store_in_memory_conforms() {
    conformance::check(&ObjectBlobStore::in_memory().unwrap());
}

#[test]
fn an_upload_that_is_given_up_leaves_nothing() {
    let store = ObjectBlobStore::in_memory().unwrap();
    let mut upload = store.upload("large", 20 << 20).unwrap();
    upload.write(&vec![1; 20 << 20]).unwrap();
    drop(upload);
    assert!(store.list("").unwrap().is_empty());
    let mut upload = store.upload("small", 3).unwrap();
    upload.write(b"abc").unwrap();
    upload.finish().unwrap();
    assert_eq!(store.get("small").unwrap(), "abc");
}

#[test]
fn passing_faults_are_tried_again() {
    let faults =
        [Answer::Status(503, "<Code>SlowDown</Code>"), Answer::Status(500, ""), Answer::Cut, Answer::Status(200, "")];
    let server = Server::start(&faults);
    server.store().put("layers/1", b"x").unwrap();
    assert_eq!(server.requests().len(), faults.len());
    let server = Server::start(&[Answer::Silence, Answer::Status(200, "abc")]);
    assert_eq!(server.store().get("layers/1").unwrap(), "abc");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn lasting_faults_say_whether_another_machine_may_fare_better() {
    let slow = "<Error><Code>SlowDown</Code><Message>Reduce your request rate</Message></Error>";
    let server = Server::start(&[Answer::Status(503, slow)]);
    let error = server.store().put("layers/1", b"x").unwrap_err();
    assert_eq!(server.requests().len(), 1 + RETRIES);
    assert_eq!(error.class(), FaultClass::RetryHere, "{error}");
    for named in ["layers/1", "s3://bucket/run", "503", "SlowDown: Reduce your request rate"] {
        assert!(error.to_string().contains(named), "{named}: {error}");
    }
    let server = Server::start(&[Answer::Silence]);
    let error = server.store().get("layers/1").unwrap_err();
    assert_eq!((error.class(), server.requests().len()), (FaultClass::RetryElsewhere, 1 + RETRIES), "{error}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = store_at(nobody).put("layers/1", b"x").unwrap_err();
    assert_eq!(error.class(), FaultClass::RetryElsewhere, "{error}");
}

#[test]
fn refusals_are_not_tried_again_and_tell_no_secret() {
    let denied = "<Error><Code>AccessDenied</Code><Message>hunter22 is not welcome</Message></Error>";
    let missing = "<Error><Code>NoSuchBucket</Code><Message>none</Message></Error>";
    let expired = "<Error><Code>ExpiredToken</Code><Message>old</Message></Error>";
    for (status, body, code) in
        [(403, denied, "AccessDenied"), (404, missing, "NoSuchBucket"), (400, expired, "ExpiredToken")]
    {
        let server = Server::start(&[Answer::Status(status, body)]);
        let error = server.store().put("layers/1", b"x").unwrap_err();
        assert_eq!((error.class(), server.requests().len()), (FaultClass::Reject, 1), "{error}");
        assert!(error.to_string().contains(code) && !error.to_string().contains("hunter22"), "{error}");
    }
    let server = Server::start(&[Answer::Status(404, "<Error><Code>NoSuchKey</Code></Error>")]);
    assert!(matches!(server.store().get("layers/1"), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_conditional_put_is_asked_for_and_its_refusal_understood() {
    let server = Server::start(&[Answer::Status(412, "<Error><Code>PreconditionFailed</Code></Error>")]);
    assert_eq!(server.store().put_if_absent("journal/0", b"x").unwrap(), Placed::AlreadyThere);
    let requests = server.requests();
    assert!(requests.len() == 1 && requests[0].to_ascii_lowercase().contains("if-none-match: *"), "{requests:?}");
    let server = Server::start(&[Answer::Status(501, "")]);
    assert!(server.store().put_if_absent("journal/0", b"x").is_err());
}

#[test]
fn what_is_sent_carries_its_checksum() {
    let server = Server::start(&[Answer::Status(200, "")]);
    server.store().put("layers/1", b"x").unwrap();
    let requests = server.requests();
    assert!(requests[0].to_ascii_lowercase().contains("x-amz-checksum-sha256: "), "{requests:?}");
}
