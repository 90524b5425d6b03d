//! What the programs tell of themselves: probes, numbers, the page and its data, a run in a terminal; and whom they tell it.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use espalier_common::metric::{Family, Kind};
use harness::authority::{Authority, write_secret};
use harness::http::{Answer, Pem, follow, get, get_over_tls};
use harness::process::{PATIENCE, Running, Workplace};
use harness::{golden, repository, tiny};
use serde_json::Value;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::cluster::Cluster;

const VIEWERS_TOKEN: &str = "9b71d2-viewers-token-for-a-test-0000002";

/// The variable that turns pages on.
fn with_pages() -> Vec<(&'static str, String)> {
    vec![("ESPALIER__HTTP__LISTEN", "127.0.0.1:0".to_owned())]
}

/// A job of a few seconds.
fn prune() -> Vec<String> {
    let (model, text) = (tiny("llama-tiny"), golden().join("text"));
    let file = |name: &str| text.join(name).display().to_string();
    let arguments = ["prune", &model.display().to_string(), "--output", "out", "--run", "run", "--held-out", "0.125"];
    let (calibration, test) = (file("wikitext2-valid-head.txt"), file("wikitext2-test-head.txt"));
    let work = ["--samples", "32", "--seq-len", "256", "--method", "sparsegpt", "--calibration", &calibration];
    let evaluation = ["--eval", &test, "--eval-seq-len", "64", "--eval-max-windows", "4"];
    arguments.iter().chain(&work).chain(&evaluation).map(|argument| (*argument).to_owned()).collect()
}

/// Where a worker's pages are, by its log.
fn pages_of(worker: &mut Running) -> Result<String> {
    let errors = || worker.errors();
    let found = |log: String| Some(log.split_once("pages url=\"")?.1.split_once('"')?.0.to_owned());
    let clock = espalier_common::clock::Stopwatch::start();
    loop {
        if let Some(url) = found(errors()) {
            return Ok(url);
        }
        anyhow::ensure!(clock.seconds() < PATIENCE.as_secs_f64(), "no pages in {}", errors());
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn status(url: &str) -> Option<u16> {
    get(url, &[]).ok().map(|answer| answer.status)
}

/// Waits until a page answers so.
fn await_status(cluster: &mut Cluster, url: &str, wanted: u16) -> Result<()> {
    cluster.wait_until(&format!("{wanted} of {url}"), |_| (status(url) == Some(wanted)).then_some(()))
}

/// What the health service says of a service.
fn health(url: &str, service: &str) -> Result<i32> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = tonic::transport::Endpoint::from_shared(url.to_owned())?.connect().await?;
        let mut client = HealthClient::new(channel);
        Ok(client.check(HealthCheckRequest { service: service.to_owned() }).await?.into_inner().status)
    })
}

const SERVING: i32 = 1;

#[test]
fn probes_follow_what_a_program_can_do() {
    let mut cluster = Cluster::start_in(Workplace::new(), None, 1, &with_pages()).unwrap();
    let pages = cluster.coordinator.wait_for_line("pages on ").unwrap();
    let worker = pages_of(&mut cluster.workers[0].process).unwrap();
    let (coordinator_ready, worker_ready) = (format!("{pages}/readyz"), format!("{worker}/readyz"));
    await_status(&mut cluster, &worker_ready, 200).unwrap();
    for url in [&pages, &worker] {
        let healthy = get(&format!("{url}/healthz"), &[]).unwrap();
        assert_eq!((healthy.status, healthy.body.as_str()), (200, "alive\n"));
    }
    assert_eq!(get(&coordinator_ready, &[]).unwrap().body, "ready\n");
    assert_eq!(health(&cluster.url, "espalier.v1.Coordinator").unwrap(), SERVING);
    assert_eq!(health(&cluster.url, "espalier.v1.Admin").unwrap(), SERVING);

    // Its coordinator is gone: it lives, but cannot do what it is there for.
    cluster.coordinator.kill().unwrap();
    let clock = espalier_common::clock::Stopwatch::start();
    while status(&worker_ready) != Some(503) {
        assert!(clock.seconds() < PATIENCE.as_secs_f64(), "the worker is still ready");
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(get(&worker_ready, &[]).unwrap().body, "the coordinator does not answer\n");
    assert_eq!(status(&format!("{worker}/healthz")), Some(200));
    cluster.start_again().unwrap();
    await_status(&mut cluster, &worker_ready, 200).unwrap();

    // Nobody has a coordinator at this address.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let nowhere = format!("http://{}", free.local_addr().unwrap());
    drop(free);
    let arguments = ["serve", "--coordinator", &nowhere, "--threads", "1"];
    let mut alone = cluster.workplace.start_with("espalier-worker", arguments, &with_pages()).unwrap();
    let alone_pages = pages_of(&mut alone).unwrap();
    let answer = get(&format!("{alone_pages}/readyz"), &[]).unwrap();
    assert_eq!((answer.status, answer.body.as_str()), (503, "it is not registered\n"));
}

/// Names of families in a scrape.
fn names(scrape: &str) -> BTreeSet<String> {
    scrape.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect()
}

fn families() -> impl Iterator<Item = &'static Family> {
    espalier_coordinator::metrics::FAMILIES.iter().chain(espalier_worker::metrics::FAMILIES)
}

/// `promtool check metrics`, where there is one.
#[allow(clippy::print_stderr, reason = "a check that was skipped is told")]
fn check_with_promtool(scrape: &str) {
    use std::io::Write as _;
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("SKIPPED: there is no promtool, so no scrape was checked by it");
        return;
    };
    promtool.stdin.take().expect("it is piped").write_all(scrape.as_bytes()).expect("promtool reads");
    let checked = promtool.wait_with_output().expect("promtool ends");
    let said = String::from_utf8_lossy(&checked.stderr).into_owned() + &String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success() && said.is_empty(), "promtool: {said}\n{scrape}");
    eprintln!("promtool check metrics: {} lines, no complaint", scrape.lines().count());
}

#[test]
fn a_run_is_told_of_as_its_report_has_it() {
    let mut cluster = Cluster::start_in(Workplace::new(), None, 2, &with_pages()).unwrap();
    let pages = cluster.coordinator.wait_for_line("pages on ").unwrap();
    let url = |path: &str| format!("{pages}{path}");
    let page = get(&url("/"), &[]).unwrap();
    assert!(
        page.body.starts_with("<!doctype html>") && page.head.contains("content-security-policy: default-src 'none'")
    );
    assert_eq!(status(&url("/api/state?run=job-1")), Some(404));

    let submitted = cluster.submit(&prune()).unwrap();
    // Numbers of the run that goes on are gone once it has ended.
    let mut exported = BTreeSet::new();
    cluster
        .wait_until("numbers of a run", |_| {
            let scrape = get(&url("/metrics"), &[]).ok()?.body;
            exported.extend(names(&scrape));
            exported.contains("espalier_run_eta_seconds").then_some(())
        })
        .unwrap();
    let watching = cluster.workplace.start(["status", "--watch", "job-1", "--coordinator", &cluster.url]).unwrap();
    let is_done = |text: &str| text.contains(r#""head":{"state":"done""#).then(|| text.to_owned());
    let told = follow(&url("/api/events?run=job-1"), is_done).unwrap();
    assert!(told.contains("event: fleet\n") && told.contains("event: run\n"), "{told}");
    submitted.finish(PATIENCE).unwrap().success().unwrap();

    let folder = cluster.run();
    let report: Value = serde_json::from_slice(&fs::read(folder.join("report.json")).unwrap()).unwrap();
    let state: Value = serde_json::from_str(&get(&url("/api/state?run=job-1"), &[]).unwrap().body).unwrap();
    assert_eq!(state["fleet"]["runs"][0]["state"], "done");
    assert_eq!(state["fleet"]["workers"].as_array().unwrap().len(), 2);
    same_as_report(&state["run"], &report);
    let served: Value = serde_json::from_str(&get(&url("/api/report?run=job-1"), &[]).unwrap().body).unwrap();
    assert_eq!(served, report);

    // The page that was left, and the one that is made again.
    let again = cluster.workplace.run(["report", "run", "--html", "again.html", "--json"]).unwrap().success().unwrap();
    assert_eq!(again.json().unwrap(), report);
    for path in [folder.join("report.html"), cluster.workplace.path().join("again.html")] {
        let frozen = frozen(&fs::read_to_string(&path).unwrap());
        same_as_report(&frozen["run"], &report);
        let spans = frozen["run"]["spans"]["items"].as_array().unwrap();
        let pruned = spans.iter().filter(|span| span["kind"] == "prune" && span["end"] == "done").count();
        assert_eq!(pruned as u64, report["model"]["layers"].as_u64().unwrap(), "{}", path.display());
    }

    // In a terminal; and by the journal alone.
    let watched = watching.finish(PATIENCE).unwrap().success().unwrap();
    let lines: Vec<_> = watched.stdout.lines().collect();
    assert_eq!(lines.iter().filter(|line| line.contains(" pruned by ")).count(), 4, "{lines:?}");
    assert_eq!(lines.last(), Some(&"done"));
    let kept = cluster.workplace.run(["status", "--watch", "run/"]).unwrap().success().unwrap();
    assert_eq!(kept.stdout.lines().filter(|line| line.contains(" pruned by ")).count(), 4, "{}", kept.stdout);

    let scrape = get(&url("/metrics"), &[]).unwrap().body;
    check_with_promtool(&scrape);
    exported.extend(names(&scrape));
    for member in &mut cluster.workers {
        let worker = pages_of(&mut member.process).unwrap();
        let scrape = get(&format!("{worker}/metrics"), &[]).unwrap().body;
        check_with_promtool(&scrape);
        exported.extend(names(&scrape));
        assert_eq!(status(&format!("{worker}/")), Some(404), "a worker has no page");
    }
    assert!(scrape.contains("espalier_layers_committed_total 4\n"), "{scrape}");
    let documented: BTreeSet<String> = families().map(|family| family.name.to_owned()).collect();
    assert_eq!(exported, documented);
}

/// The data that a page has in it.
fn frozen(html: &str) -> Value {
    let data = html.split_once("<script type=\"application/json\" id=\"data\">").expect("there is data").1;
    serde_json::from_str(data.split_once("</script>").expect("it ends").0).expect("it is JSON")
}

/// Compares what is shown of a run that is done with its report.
fn same_as_report(run: &Value, report: &Value) {
    let head = &run["head"];
    assert_eq!((&head["state"], &head["run"]), (&Value::from("done"), &report["run"]));
    for (shown, total) in
        [("seconds_by_phase", "seconds_by_phase"), ("bytes_moved", "bytes_moved"), ("retries", "retries")]
    {
        assert_eq!(head[shown], report["totals"][total], "{shown}");
    }
    assert_eq!(head["perplexity"], report["perplexity"]);
    let layers = run["layers"]["items"].as_array().expect("it is a list");
    assert!(layers.iter().all(|layer| layer["at"].as_u64() > Some(0)), "when layers were committed is not told");
    let cells: Vec<&Value> = layers.iter().flat_map(|layer| layer["cells"].as_array().expect("it is a list")).collect();
    let sublayers = report["sublayers"].as_array().expect("it is a list");
    assert_eq!(cells.len(), sublayers.len());
    for (cell, sublayer) in cells.iter().zip(sublayers) {
        for (shown, name) in [("error", "rel_error"), ("held_out", "held_out_error"), ("sparsity", "sparsity")] {
            assert_eq!(cell[shown], sublayer[name], "{sublayer}");
        }
        let kind = cell["kind"].as_str().expect("it is a string");
        assert!(
            sublayer["name"].as_str().expect("it is a string").contains(&format!(".{kind}.")),
            "{kind} of {sublayer}"
        );
    }
}

#[test]
fn watching_a_run_that_is_cancelled_ends_with_its_exit_code() {
    let mut cluster = Cluster::start_in(Workplace::new(), None, 1, &[]).unwrap();
    // Of two workers that a run would wait for there is one.
    cluster.wanted = 2;
    cluster.restart().unwrap();
    let submitted = cluster.submit(&prune()).unwrap();
    let status = |cluster: &Cluster| cluster.workplace.run(["status", "--json", "--coordinator", &cluster.url]).ok();
    cluster.wait_until("a run", |cluster| status(cluster)?.stdout.contains("\"running\"").then_some(())).unwrap();
    let watching = cluster.workplace.start(["status", "--watch", "job-1", "--coordinator", &cluster.url]).unwrap();
    cluster.workplace.run(["cancel", "job-1", "--coordinator", &cluster.url]).unwrap().success().unwrap();
    let watched = watching.finish(PATIENCE).unwrap();
    assert_eq!(watched.code(), Some(75), "{}{}", watched.stdout, watched.stderr);
    assert_eq!(submitted.finish(PATIENCE).unwrap().code(), Some(75));
    let unknown = cluster.workplace.run(["status", "--watch", "job-7", "--coordinator", &cluster.url]).unwrap();
    assert_eq!(unknown.code(), Some(65), "{}", unknown.stderr);
}

#[test]
fn a_run_on_one_machine_shows_its_page_on_loopback_only() {
    let workplace = Workplace::new();
    let with_page = |address: &str| prune().into_iter().chain(["--http".to_owned(), address.to_owned()]);
    let open = workplace.run(with_page("0.0.0.0:0")).unwrap();
    assert_eq!(open.code(), Some(65), "{}", open.stderr);
    assert!(
        open.stderr.contains("--http is 0.0.0.0:0, but without [tls] only loopback is listened on"),
        "{}",
        open.stderr
    );

    let mut running = workplace.start(with_page("127.0.0.1:0")).unwrap();
    let log = || running.errors();
    let found = |log: String| Some(log.split_once("page on ")?.1.split_once('\n')?.0.to_owned());
    let clock = espalier_common::clock::Stopwatch::start();
    let page = loop {
        if let Some(page) = found(log()) {
            break page;
        }
        assert!(clock.seconds() < PATIENCE.as_secs_f64(), "{}", log());
        std::thread::sleep(Duration::from_millis(2));
    };
    let told = follow(&format!("{page}/api/events?run=this"), |text| text.contains("\"cells\":[{").then_some(()));
    told.unwrap();
    // The name of another site that leads here.
    let answer = get(&format!("{page}/api/state"), &[("host", "rebound.example")]).unwrap();
    assert_eq!(answer.status, 421, "{}", answer.body);
    running.wait_until("the end", || workplace.path().join("run/report.html").exists().then_some(())).unwrap();
    running.finish(PATIENCE).unwrap().success().unwrap();
}

#[test]
fn over_tls_pages_are_for_viewers_and_probes_for_everybody() {
    let workplace = Workplace::new();
    let path = |name: &str| workplace.path().join(name);
    let authority = Authority::new("the authority").unwrap();
    authority.equip(&path("coordinator"), "coordinator", &["coordinator"]).unwrap();
    authority.equip(&path("vera"), "vera", &["viewer"]).unwrap();
    authority.equip(&path("worker"), "worker", &["worker"]).unwrap();
    write_secret(&path("tokens"), &format!("viewer {VIEWERS_TOKEN} bob\n")).unwrap();
    let config = "[coordinator]\nlisten = \"127.0.0.1:0\"\nruns = \"runs\"\n[tls]\nfolder = \"coordinator\"\n[auth]\n\
                  tokens = \"tokens\"\n[http]\nlisten = \"127.0.0.1:0\"\n";
    fs::write(path("c.toml"), config).unwrap();
    let mut coordinator = workplace.start(["coordinator", "--config", "c.toml"]).unwrap();
    let pages = coordinator.wait_for_line("pages on ").unwrap();
    assert!(pages.starts_with("https://127.0.0.1:"), "{pages}");
    let ca = authority.pem();
    let read = |name: &str, file: &str| fs::read_to_string(path(name).join(file)).unwrap();
    let ask = |page: &str, who: Option<&str>, headers: &[(&str, &str)]| -> Result<Answer> {
        let files = who.map(|who| (read(who, "tls.crt"), read(who, "tls.key")));
        let identity = files.as_ref().map(|(certificate, key)| (certificate.as_str(), key.as_str()));
        get_over_tls(&format!("{pages}{page}"), Pem { ca: &ca, identity }, headers).context("no answer")
    };
    let bearer = |token: &str| format!("Bearer {token}");
    for page in ["/healthz", "/readyz"] {
        assert_eq!(ask(page, None, &[]).unwrap().status, 200, "{page}");
    }
    for page in ["/", "/metrics", "/api/state", "/api/events", "/api/report?run=job-1", "/report?run=job-1"] {
        let refused = ask(page, None, &[]).unwrap();
        assert_eq!(refused.status, 401, "{page}");
        assert!(refused.head.contains("www-authenticate: basic"), "a browser does not ask: {}", refused.head);
        assert_eq!(
            ask(page, None, &[("authorization", &bearer("not-a-token-that-anybody-has-in-a-file"))]).unwrap().status,
            401
        );
        assert_eq!(ask(page, Some("worker"), &[]).unwrap().status, 403, "{page}");
    }
    for page in ["/", "/metrics", "/api/state"] {
        assert_eq!(ask(page, None, &[("authorization", &bearer(VIEWERS_TOKEN))]).unwrap().status, 200, "{page}");
        assert_eq!(ask(page, Some("vera"), &[]).unwrap().status, 200, "{page}");
    }
    // `bob:` and the token, as a browser sends them.
    let basic = "Basic Ym9iOjliNzFkMi12aWV3ZXJzLXRva2VuLWZvci1hLXRlc3QtMDAwMDAwMg==";
    assert_eq!(ask("/", None, &[("authorization", basic)]).unwrap().status, 200);
    assert_eq!(ask("/../etc/passwd", Some("vera"), &[]).unwrap().status, 404);
    coordinator.interrupt().unwrap();
    let log = coordinator.finish(PATIENCE).unwrap().stderr;
    assert!(log.contains("page refused") && log.contains("CN=worker") && !log.contains(VIEWERS_TOKEN), "{log}");

    fs::write(path("open.toml"), "[http]\nlisten = \"0.0.0.0:0\"\n").unwrap();
    let open = workplace.run(["coordinator", "--config", "open.toml", "--listen", "127.0.0.1:0"]).unwrap();
    assert_eq!(open.code(), Some(65), "{}", open.stderr);
    assert!(open.stderr.contains("http.listen is 0.0.0.0:0, but without [tls]"), "{}", open.stderr);
}

/// Names of metrics in a text, without what Prometheus adds to histograms.
fn named(text: &str) -> BTreeSet<String> {
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let words = text.split(|character: char| !is_name(character)).filter(|word| word.starts_with("espalier_"));
    let histograms: Vec<_> = families().filter(|family| matches!(family.kind, Kind::Histogram(_))).collect();
    let base = |word: &str| {
        let of = |suffix: &str| word.strip_suffix(suffix).filter(|base| histograms.iter().any(|f| f.name == *base));
        ["_bucket", "_sum", "_count"].iter().find_map(|suffix| of(suffix)).unwrap_or(word).to_owned()
    };
    words.map(base).collect()
}

#[test]
fn rules_dashboard_and_runbook_name_what_is_exported() {
    let read = |name: &str| fs::read_to_string(repository().join("deploy/observability").join(name)).unwrap();
    let documented: BTreeSet<String> = families().map(|family| family.name.to_owned()).collect();
    assert_eq!(documented.len(), families().count(), "a name stands twice");
    for file in ["rules.yaml", "rules_test.yaml", "dashboard.json", "RUNBOOK.md"] {
        let names = named(&read(file));
        assert!(!names.is_empty(), "{file} names nothing");
        let unknown: Vec<_> = names.difference(&documented).collect();
        assert!(unknown.is_empty(), "{file} names what is not exported: {unknown:?}");
    }
    let (rules, runbook) = (read("rules.yaml"), read("RUNBOOK.md"));
    for family in families() {
        let row = runbook.lines().find(|line| line.starts_with(&format!("| `{}` |", family.name)));
        let row = row.unwrap_or_else(|| panic!("RUNBOOK.md does not list {}", family.name));
        assert!(row.contains(family.help), "RUNBOOK.md says something else of {}: {row}", family.name);
        let is_counter = family.kind == Kind::Counter;
        assert_eq!(family.name.ends_with("_total"), is_counter, "{}", family.name);
    }
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 5, "{alerts:?}");
    for alert in alerts {
        assert!(runbook.contains(&format!("### {alert}\n")), "RUNBOOK.md has no entry for {alert}");
        assert!(
            rules.contains(&format!("RUNBOOK.md#{}\"", alert.to_lowercase())),
            "{alert} does not lead to its entry"
        );
    }
    let dashboard: Value = serde_json::from_str(&read("dashboard.json")).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10);
}
