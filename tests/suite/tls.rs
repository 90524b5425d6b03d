//! Closed by default, open with TLS: who is let in, who is turned away, and what a run over it gives.

use std::fs;
use std::io::Write as _;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use harness::authority::{Authority, write_secret};
use harness::checkpoint::same_files;
use harness::process::{Finished, PATIENCE, Running, Workplace};
use harness::{golden, tiny};

/// How long a command takes at most that only asks: less than a worker waits for an absent coordinator.
const SOON: Duration = Duration::from_secs(25);

const SUBMITTERS_TOKEN: &str = "3f0c4a-submitters-token-for-a-test-0001";
const VIEWERS_TOKEN: &str = "9b71d2-viewers-token-for-a-test-0000002";
const NOBODYS_TOKEN: &str = "77aa01-nobodys-token-for-a-test-0000003";

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

fn prune(more: &[&str]) -> Vec<String> {
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--calibration", utf8(&text)];
    let work = ["--samples", "8", "--seq-len", "64", "--method", "sparsegpt"];
    arguments.iter().chain(&work).chain(more).map(|argument| (*argument).to_owned()).collect()
}

/// A coordinator with certificates, and tokens beside them.
struct Closed {
    workplace: Workplace,
    authority: Authority,
    coordinator: Running,
    url: String,
}

impl Closed {
    fn start(workers: usize, tokens: bool) -> Result<Self> {
        let workplace = Workplace::new();
        let authority = Authority::new("the authority")?;
        authority.equip(&workplace.path().join("coordinator"), "the coordinator", &["coordinator"])?;
        let mut config = format!("[coordinator]\nlisten = \"127.0.0.1:0\"\nruns = \"runs\"\nworkers = {workers}\n");
        config.push_str("[tls]\nfolder = \"coordinator\"\n");
        if tokens {
            let text = format!("submitter {SUBMITTERS_TOKEN} alice\nviewer {VIEWERS_TOKEN} bob\n");
            write_secret(&workplace.path().join("tokens"), &text)?;
            config.push_str("[auth]\ntokens = \"tokens\"\n");
        }
        fs::write(workplace.path().join("coordinator.toml"), config)?;
        let mut coordinator = workplace.start(["coordinator", "--config", "coordinator.toml"])?;
        let url = coordinator.wait_for_line("listening on ")?;
        ensure!(url.starts_with("https://127.0.0.1:"), "{url}");
        Ok(Self { workplace, authority, coordinator, url })
    }

    /// Certificates for a client in a folder of its own name.
    fn equip(&self, name: &str, roles: &[&str]) -> Result<()> {
        self.authority.equip(&self.workplace.path().join(name), name, roles)
    }

    fn worker(&self, folder: &str, more: &[&str]) -> Result<Running> {
        let arguments = ["serve", "--coordinator", &self.url, "--threads", "1", "--tls-folder", folder];
        self.workplace.start_program("espalier-worker", arguments.iter().chain(more))
    }

    fn status(&self, access: &[&str]) -> Result<Finished> {
        self.workplace.start(["status", "--json", "--coordinator", &self.url].iter().chain(access))?.finish(SOON)
    }

    fn submit(&self, access: &[&str]) -> Result<Finished> {
        let arguments = prune(&[&["--coordinator", &self.url], access].concat());
        self.workplace.start(arguments)?.finish(PATIENCE)
    }

    /// Ends the coordinator; returns its log.
    fn log(self) -> Result<String> {
        self.coordinator.interrupt()?;
        Ok(self.coordinator.finish(PATIENCE)?.stderr)
    }
}

/// Checks that a command was refused with one line that says why.
fn refused(finished: &Finished, code: i32, why: &str) {
    assert_eq!(finished.code(), Some(code), "{why}: {}{}", finished.stdout, finished.stderr);
    let lines = finished.error_lines();
    assert!(lines.len() == 1 && lines[0].contains(why), "`{why}` is not in {lines:?}");
}

#[test]
fn a_cluster_over_mutual_tls_gives_the_bytes_of_one_machine() {
    let mut reference = Workplace::new();
    // Workers on one machine stay on it, whatever their environment says of a cluster's certificates.
    reference.set("ESPALIER__TLS__FOLDER", "/nowhere");
    reference.set("ESPALIER__WORKER__ADVERTISE", "elsewhere");
    reference.run(prune(&[])).unwrap().success().unwrap();

    let closed = Closed::start(2, false).unwrap();
    closed.equip("worker-1", &["worker"]).unwrap();
    closed.equip("worker-2", &["worker"]).unwrap();
    closed.equip("alice", &["submitter"]).unwrap();
    let _first = closed.worker("worker-1", &[]).unwrap();
    let _second = closed.worker("worker-2", &["--advertise", "localhost"]).unwrap();
    closed.submit(&["--tls-folder", "alice"]).unwrap().success().unwrap();
    same_files(&reference.path().join("out"), &closed.workplace.path().join("out")).unwrap();
    let report = fs::read_to_string(closed.workplace.path().join("run/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(report["totals"]["bytes_moved"].as_u64() > Some(0), "no hidden state went from worker to worker: {report}");

    // A worker that passes itself off as the coordinator is not believed, though the authority vouches for it.
    let status = closed.status(&["--tls-folder", "alice"]).unwrap().success().unwrap().json().unwrap();
    let endpoints: Vec<_> = status["workers"].as_array().unwrap().iter().map(endpoint).collect();
    assert!(endpoints.iter().any(|endpoint| endpoint.starts_with("https://localhost:")), "{endpoints:?}");
    let arguments = ["status", "--tls-folder", "alice", "--coordinator", &endpoints[0]];
    refused(&closed.workplace.run(arguments).unwrap(), 65, "has not the role coordinator");
}

fn endpoint(worker: &serde_json::Value) -> String {
    let offer = worker.get("offer").unwrap_or(worker);
    offer["endpoint"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn who_cannot_say_who_he_is_is_turned_away() {
    let closed = Closed::start(1, false).unwrap();
    let folder = |name: &str| closed.workplace.path().join(name);
    closed.equip("alice", &["submitter"]).unwrap();
    closed.authority.equip_until(&folder("late"), "late", &["submitter"], 2020).unwrap();
    let other = Authority::new("another authority").unwrap();
    other.equip(&folder("foreigner"), "foreigner", &["submitter", "worker"]).unwrap();
    fs::write(folder("foreigner").join("ca.crt"), closed.authority.pem()).unwrap();
    other.equip(&folder("misled"), "misled", &["submitter"]).unwrap();

    closed.status(&["--tls-folder", "alice"]).unwrap().success().unwrap();
    let status = |access: &[&str]| closed.status(access).unwrap();
    refused(&status(&["--tls-ca", "alice/ca.crt"]), 65, "CertificateRequired");
    refused(&status(&["--tls-folder", "foreigner"]), 65, "the server refuses this process' certificate");
    refused(&status(&["--tls-folder", "late"]), 65, "CertificateExpired");
    refused(&status(&["--tls-folder", "misled"]), 65, "the server's certificate is not believed");
    refused(&status(&[]), 65, "needs [tls]");
    let plain = closed.url.replace("https://", "http://");
    let over_http = closed.workplace.run(["status", "--coordinator", &plain]).unwrap();
    assert_eq!(over_http.code(), Some(75), "{}", over_http.stderr);
    let worker = closed.worker("foreigner", &[]).unwrap().finish(SOON).unwrap();
    refused(&worker, 65, "the server refuses this process' certificate");

    let log = closed.log().unwrap();
    let turned_away =
        |needle: &str| log.lines().any(|line| line.contains("connection refused") && line.contains(needle));
    for needle in ["CN=foreigner", "CN=late", "peer sent no certificates", "UnknownIssuer", "expired"] {
        assert!(turned_away(needle), "`{needle}` is not in the log:\n{log}");
    }
    assert!(log.lines().filter(|line| line.contains("connection refused")).all(|line| line.contains("127.0.0.1:")));
}

#[test]
fn who_may_not_is_refused() {
    let closed = Closed::start(1, true).unwrap();
    for (name, roles) in [("vera", &["viewer"][..]), ("worker-1", &["worker"]), ("nobody", &[])] {
        closed.equip(name, roles).unwrap();
    }
    let file = |name: &str, token: &str| write_secret(&closed.workplace.path().join(name), token).unwrap();
    file("submitters", SUBMITTERS_TOKEN);
    file("viewers", VIEWERS_TOKEN);
    file("nobodys", NOBODYS_TOKEN);
    let token = |file| ["--tls-ca", "coordinator/ca.crt", "--token-file", file];

    closed.status(&["--tls-folder", "vera"]).unwrap().success().unwrap();
    closed.status(&token("viewers")).unwrap().success().unwrap();
    closed.status(&token("submitters")).unwrap().success().unwrap();
    refused(&closed.status(&token("nobodys")).unwrap(), 65, "the token is not known");
    refused(&closed.status(&["--tls-ca", "coordinator/ca.crt"]).unwrap(), 65, "needs a certificate or a token");
    refused(&closed.status(&["--tls-folder", "nobody"]).unwrap(), 65, "has: none");
    // A wrong token is not overlooked because the certificate would do.
    refused(&closed.status(&["--tls-folder", "vera", "--token-file", "nobodys"]).unwrap(), 65, "not known");
    refused(&closed.submit(&["--tls-folder", "vera"]).unwrap(), 65, "is for submitter, but CN=vera has: viewer");
    refused(&closed.submit(&token("viewers")).unwrap(), 65, "is for submitter, but bob has: viewer");
    refused(
        &closed.submit(&["--tls-folder", "worker-1"]).unwrap(),
        65,
        "is for submitter, but CN=worker-1 has: worker",
    );
    let cancel = ["cancel", "some-run", "--coordinator", &closed.url, "--tls-folder", "vera"];
    refused(&closed.workplace.run(cancel).unwrap(), 65, "is for submitter");
    // A program that could never do its part says so at once.
    refused(&closed.worker("vera", &[]).unwrap().finish(SOON).unwrap(), 65, "URI:espalier:role:worker");
    // A token of a submitter is let in, and is then told that there is no such run.
    let cancel = ["cancel", "some-run", "--coordinator", &closed.url].into_iter().chain(token("submitters"));
    refused(&closed.workplace.run(cancel).unwrap(), 65, "no run some-run");

    // A token that is taken out of the file is not taken any more.
    file("tokens", &format!("submitter {SUBMITTERS_TOKEN} alice\n"));
    refused(&closed.status(&token("viewers")).unwrap(), 65, "the token is not known");

    let log = closed.log().unwrap();
    for needle in ["CN=vera", "CN=worker-1", "/espalier.v1.Admin/Submit", "the token is not known", "no certificate"] {
        let found = log.lines().any(|line| line.contains("call refused") && line.contains(needle));
        assert!(found, "`{needle}` is not in the log:\n{log}");
    }
    for secret in [SUBMITTERS_TOKEN, VIEWERS_TOKEN, NOBODYS_TOKEN] {
        assert!(!log.contains(secret), "a token is in the log:\n{log}");
    }
}

#[test]
fn rotated_certificates_are_used_without_a_restart() {
    let closed = Closed::start(1, false).unwrap();
    let folder = |name: &str| closed.workplace.path().join(name);
    closed.equip("before", &["viewer"]).unwrap();
    let next = Authority::new("the next authority").unwrap();
    next.equip(&folder("after"), "after", &["viewer"]).unwrap();
    closed.status(&["--tls-folder", "before"]).unwrap().success().unwrap();
    refused(&closed.status(&["--tls-folder", "after"]).unwrap(), 65, "not believed");

    // Half a rotation: the certificate does not go with the key. The former ones count.
    let key = fs::read_to_string(folder("coordinator/tls.key")).unwrap();
    next.equip(&folder("coordinator"), "the next coordinator", &["coordinator"]).unwrap();
    let next_key = fs::read_to_string(folder("coordinator/tls.key")).unwrap();
    write_secret(&folder("coordinator/tls.key"), &key).unwrap();
    closed.status(&["--tls-folder", "before"]).unwrap().success().unwrap();

    write_secret(&folder("coordinator/tls.key"), &next_key).unwrap();
    closed.status(&["--tls-folder", "after"]).unwrap().success().unwrap();
    refused(&closed.status(&["--tls-folder", "before"]).unwrap(), 65, "not believed");
    let log = closed.log().unwrap();
    assert!(log.contains("certificates cannot be read again") && log.contains("certificates were replaced"), "{log}");
    assert!(!log.contains("PRIVATE KEY"), "{log}");
}

#[test]
fn who_connects_and_never_speaks_stops_nobody() {
    let closed = Closed::start(1, false).unwrap();
    closed.equip("vera", &["viewer"]).unwrap();
    let address = closed.url.trim_start_matches("https://");
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut babbling = TcpStream::connect(address).unwrap();
    babbling.write_all(b"GET / HTTP/1.1\r\nHost: coordinator\r\n\r\n").unwrap();
    closed.status(&["--tls-folder", "vera"]).unwrap().success().unwrap();
    drop((silent, babbling));
}

#[test]
fn beyond_loopback_nothing_is_said_or_heard_without_tls() {
    let workplace = Workplace::new();
    let coordinator = workplace.start(["coordinator", "--listen", "0.0.0.0:0"]).unwrap().finish(SOON).unwrap();
    refused(&coordinator, 65, "coordinator.listen is 0.0.0.0:0, but without [tls] only loopback is listened on");
    let worker =
        |arguments: &[&str]| workplace.start_program("espalier-worker", arguments).unwrap().finish(SOON).unwrap();
    let open = worker(&["serve", "--coordinator", "http://127.0.0.1:1", "--listen", "[::]:0"]);
    refused(&open, 65, "worker.listen is [::]:0, but without [tls] only loopback is listened on");
    let plain = worker(&["serve", "--coordinator", "http://192.0.2.1:7433"]);
    refused(&plain, 65, "http://192.0.2.1:7433 is not encrypted");
    let status = workplace.start(["status", "--coordinator", "http://192.0.2.1:7433"]).unwrap().finish(SOON).unwrap();
    refused(&status, 65, "http://192.0.2.1:7433 is not encrypted");

    write_secret(&workplace.path().join("token"), SUBMITTERS_TOKEN).unwrap();
    let token = workplace.run(["status", "--token-file", "token"]).unwrap();
    refused(&token, 65, "client.token_file needs [tls]");
    write_secret(&workplace.path().join("tokens"), &format!("viewer {VIEWERS_TOKEN} bob")).unwrap();
    fs::write(workplace.path().join("c.toml"), "[auth]\ntokens = \"tokens\"\n").unwrap();
    refused(&workplace.run(["coordinator", "--config", "c.toml"]).unwrap(), 65, "auth.tokens needs [tls]");
}
