//! A cluster as it is in production, on one machine: coordinator, three workers and an object store in network namespaces of their
//! own, with mutual TLS between them.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::clock::{Clock as _, SystemClock};
use harness::authority::Authority;
use harness::checkpoint::same_files;
use harness::network::Network;
use harness::process::{PATIENCE, Running, Workplace};
use harness::s3::{BUCKET, S3Server, python};
use harness::{golden, tiny};

/// Machines: the coordinator's, the workers', the store's.
const COORDINATOR: usize = 0;
const WORKERS: [usize; 3] = [1, 2, 3];
const STORE: usize = 4;

/// Copies all objects below a prefix: BUCKET PREFIX FOLDER.
const DOWNLOAD: &str = "
import boto3, os, sys
bucket, prefix, folder = sys.argv[1:]
client = boto3.client('s3', endpoint_url=os.environ['AWS_ENDPOINT_URL'])
for found in client.get_paginator('list_objects_v2').paginate(Bucket=bucket, Prefix=prefix):
    for item in found.get('Contents', []):
        client.download_file(bucket, item['Key'], os.path.join(folder, os.path.relpath(item['Key'], prefix)))
";

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// Machines, a store on one of them, and certificates for the others.
struct Site {
    // In this order they end: processes before their network.
    server: S3Server,
    workplace: Workplace,
    network: Network,
}

impl Site {
    /// `None`, said aloud, where there can be none.
    #[expect(clippy::print_stderr, reason = "a skipped test is loud")]
    fn new() -> Result<Option<Self>> {
        if let Some(why) = Network::impediment() {
            eprintln!("SKIPPED: no network of our own can be made here: {why}");
            return Ok(None);
        }
        let network = Network::new(STORE + 1, 1)?;
        let Some(server) = S3Server::start_on(&network.on(STORE), &network.address(STORE))? else { return Ok(None) };
        let workplace = server.workplace();
        let site = Self { server, workplace, network };
        let authority = Authority::new("the authority")?;
        site.equip(&authority, COORDINATOR, "coordinator", &["coordinator"])?;
        for machine in WORKERS {
            site.equip(&authority, machine, &format!("worker-{machine}"), &["worker"])?;
        }
        site.equip(&authority, COORDINATOR, "alice", &["submitter"])?;
        Ok(Some(site))
    }

    fn equip(&self, authority: &Authority, machine: usize, name: &str, roles: &[&str]) -> Result<()> {
        let address: Ipv4Addr = self.network.address(machine).parse()?;
        authority.equip_at(&self.workplace.path().join(name), name, roles, address, 4096)
    }

    fn job(&self) -> Result<()> {
        let text = golden().join("text/wikitext2-valid-head.txt");
        let job = format!(
            "[model]\nsource = \"{}\"\n[calibration]\nsource = \"{}\"\nsamples = 32\nsequence_length = 128\n\
             [output]\nuri = \"s3://{BUCKET}/out\"\n",
            utf8(&tiny("llama-tiny")),
            utf8(&text)
        );
        Ok(fs::write(self.workplace.path().join("job.toml"), job)?)
    }

    fn coordinator(&self, more: &[&str]) -> Result<(Running, String)> {
        let listen = format!("{}:0", self.network.address(COORDINATOR));
        let arguments = ["coordinator", "--listen", &listen, "--workers", "3"];
        let folder = [("ESPALIER__TLS__FOLDER", "coordinator".to_owned())];
        let arguments = arguments.iter().chain(more);
        let mut process = self.workplace.start_on(&self.network.on(COORDINATOR), "espalier", arguments, &folder)?;
        let url = process.wait_for_line("listening on ")?;
        ensure!(url.starts_with("https://"), "{url}");
        Ok((process, url))
    }

    fn worker(&self, machine: usize, url: &str) -> Result<Running> {
        let (listen, folder) = (format!("{}:0", self.network.address(machine)), format!("worker-{machine}"));
        let arguments = ["serve", "--coordinator", url, "--listen", &listen, "--threads", "1", "--tls-folder", &folder];
        self.workplace.start_on(&self.network.on(machine), "espalier-worker", arguments, &[])
    }

    /// Copies what is below a prefix in the bucket into a folder.
    fn download(&self, prefix: &str, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let by = self.network.on(COORDINATOR);
        let done = Command::new(&by[0])
            .args(&by[1..])
            .arg(python())
            .args(["-c", DOWNLOAD, BUCKET, prefix, utf8(folder)])
            .envs(self.server.variables())
            .stdin(Stdio::null())
            .output()?;
        ensure!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        Ok(())
    }
}

#[test]
fn a_job_on_a_store_with_certificates_survives_a_worker_and_gives_the_bytes_of_one_machine() {
    let Some(site) = Site::new().unwrap() else { return };
    site.job().unwrap();
    let reference = Workplace::new();
    fs::copy(site.workplace.path().join("job.toml"), reference.path().join("job.toml")).unwrap();
    let local = ["prune", "--job", "job.toml", "--output", "out", "--run", "run"];
    reference.run(local).unwrap().success().unwrap();

    let run = format!("s3://{BUCKET}/run");
    let (mut coordinator, url) = site.coordinator(&["--job", "job.toml", "--run", &run]).unwrap();
    let mut workers: Vec<_> = WORKERS.iter().map(|machine| site.worker(*machine, &url).unwrap()).collect();
    // Its own words, for the journal is where this process cannot see it.
    let clock = SystemClock::default();
    while !coordinator.errors().contains(" pruned by ") {
        assert!(Duration::from_millis(clock.now().0) < PATIENCE, "no layer was pruned\n{}", coordinator.errors());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(coordinator.ended().unwrap().is_none(), "the job was done before anybody could be killed");
    workers.remove(0).kill().unwrap();
    let finished = coordinator.finish(PATIENCE).unwrap().success().unwrap();
    // It owned a layer, and does not answer or is silent; or it had a share of another's.
    let mut missed = finished.stderr.contains("failed on") || finished.stderr.contains("is lost");
    for worker in workers {
        let left = worker.finish(PATIENCE).unwrap().success().unwrap();
        missed |= left.stderr.contains("going on without an assistant");
    }
    assert!(missed, "nobody missed the worker\n{}", finished.stderr);
    let fetched = site.workplace.path().join("fetched");
    site.download("out", &fetched).unwrap();
    same_files(&reference.path().join("out"), &fetched).unwrap();
}

/// For people: `make cluster`. It stands until standard input ends.
#[test]
#[ignore = "stands until it is told to go: make cluster"]
#[expect(clippy::print_stdout, reason = "it is for people")]
fn a_cluster_to_try_things_on() {
    let stand = || -> Result<()> {
        let site = Site::new()?.context("a cluster cannot be made here: see above")?;
        site.job()?;
        let runs = format!("s3://{BUCKET}/runs");
        let (_coordinator, url) = site.coordinator(&["--runs", &runs])?;
        let _workers: Vec<_> = WORKERS.iter().map(|machine| site.worker(*machine, &url)).collect::<Result<_>>()?;
        let by = site.network.on(COORDINATOR).join(" ");
        let program = harness::process::binary("espalier");
        println!("\nA coordinator at {url}, three workers, and a bucket, each on a machine of its own.\n");
        println!("cd {}", site.workplace.path().display());
        for (variable, value) in site.server.variables() {
            println!("export {variable}={value}");
        }
        println!("{by} {} status --coordinator {url} --tls-folder alice", program.display());
        println!("{by} {} prune --job job.toml --coordinator {url} --tls-folder alice\n", program.display());
        println!("Ctrl-D or Enter ends it.");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        Ok(())
    };
    stand().unwrap_or_else(|error| panic!("{error:#}"));
}
