//! The files under `deploy/` are what the programs read.

use std::path::{Path, PathBuf};

use espalier_common::config::{ENV_PREFIX, Overrides, load, load_document};
use espalier_common::job::JobSpec;
use espalier_coordinator::config::CoordinatorConfig;
use espalier_worker::config::WorkerConfig;
use espalier_worker::prune;

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config").join(name)
}

#[test]
fn the_example_configurations_are_taken() {
    let coordinator = CoordinatorConfig::load(Some(&config("coordinator.toml")), Overrides::default()).unwrap();
    assert!(coordinator.coordinator.listen.ip().is_loopback());
    let worker: WorkerConfig = load(Some(&config("worker.toml")), ENV_PREFIX, Overrides::default()).unwrap();
    let url = format!("http://{}", coordinator.coordinator.listen);
    assert_eq!(worker.worker.coordinator, Some(url), "the example worker must find the example coordinator");
    let pages = [coordinator.http.listen, worker.http.listen].map(|listen| listen.expect("the examples show pages"));
    assert!(pages.iter().all(|address| address.ip().is_loopback()) && pages[0] != pages[1], "{pages:?}");
}

#[test]
fn the_example_configurations_of_a_cluster_need_certificates() {
    let coordinator = CoordinatorConfig::load(Some(&config("coordinator-tls.toml")), Overrides::default()).unwrap();
    assert!(!coordinator.coordinator.listen.ip().is_loopback() && coordinator.auth.tokens.is_some());
    let worker: WorkerConfig = load(Some(&config("worker-tls.toml")), ENV_PREFIX, Overrides::default()).unwrap();
    assert!(!worker.worker.listen.ip().is_loopback() && worker.worker.advertise.is_some());
    assert!(coordinator.http.listen.is_some() && worker.http.listen.is_some());
    let port = coordinator.coordinator.listen.port();
    assert!(worker.worker.coordinator.unwrap().ends_with(&format!(".example:{port}")));
    for tls in [coordinator.tls, worker.tls] {
        assert!(tls.paths().unwrap().unwrap().identity.is_some());
    }
}

#[test]
fn the_example_job_is_valid_down_to_its_methods_parameters() {
    let job: JobSpec = load_document(&config("job.toml")).unwrap();
    job.validate().unwrap();
    let params = serde_json::Value::Object(job.method.params.clone());
    prune::build(&job.method.name, &params).unwrap();
}
