//! The files under `deploy/` are what the programs read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use espalier_common::config::{ENV_PREFIX, Overrides, load, load_document, parse_document, reference};
use espalier_common::job::JobSpec;
use espalier_coordinator::config::CoordinatorConfig;
use espalier_coordinator::manifest::{Deployment, Form, Sizes, Storage, yaml};
use espalier_worker::config::WorkerConfig;
use espalier_worker::prune;
use harness::process::{Workplace, binary};
use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

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

/// The documents of a file of manifests.
fn documents(text: &str) -> Vec<Value> {
    fn value(yaml: &Yaml) -> Value {
        match yaml {
            Yaml::String(text) => Value::from(text.as_str()),
            Yaml::Integer(number) => Value::from(*number),
            Yaml::Boolean(value) => Value::from(*value),
            Yaml::Array(values) => values.iter().map(value).collect(),
            Yaml::Hash(keys) => keys
                .iter()
                .map(|(key, of)| (key.as_str().expect("our own files are as we wrote them").to_owned(), value(of)))
                .collect(),
            other => panic!("{other:?} is in no manifest of ours"),
        }
    }
    YamlLoader::load_from_str(text).expect("our own files are as we wrote them").iter().map(value).collect()
}

fn manifests(files: &[&str]) -> Vec<Value> {
    files
        .iter()
        .flat_map(|file| documents(&std::fs::read_to_string(k8s(file)).expect("our own files are as we wrote them")))
        .collect()
}

fn k8s(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/k8s").join(file)
}

/// By kind and name; kustomize adds the namespace.
fn by_name(documents: Vec<Value>) -> BTreeMap<String, Value> {
    let named = |mut document: Value| {
        document["metadata"].as_object_mut().expect("our own files are as we wrote them").remove("namespace");
        (format!("{} {}", document["kind"], document["metadata"]["name"]), document)
    };
    documents.into_iter().map(named).collect()
}

fn deployment(form: Form, storage: Storage, job: &str) -> Deployment {
    Deployment {
        name: "espalier".to_owned(),
        namespace: "espalier".to_owned(),
        form,
        coordinator_image: "espalier-coordinator:0.1.0".to_owned(),
        worker_image: "espalier-worker:0.1.0".to_owned(),
        workers: 3,
        sizes: Sizes { cpus: 8, memory_gib: 32, memory_budget_bytes: 8 << 30, scratch_gib: 100, cache_gib: 32 },
        gpu: false,
        job: load_document(&k8s(job)).expect("our own files are as we wrote them"),
        run: None,
        storage,
        environment: BTreeMap::new(),
        queue: None,
        monitoring: true,
        cert_manager: true,
    }
}

/// What is rendered, the ConfigMaps apart.
fn rendered(deployment: &Deployment) -> (BTreeMap<String, Value>, BTreeMap<String, Value>) {
    let text = yaml::stream(&deployment.documents().expect("our own files are as we wrote them"));
    by_name(documents(&text)).into_iter().partition(|(name, _)| !name.starts_with("\"ConfigMap"))
}

const AROUND: [&str; 6] = [
    "base/account.yaml",
    "base/network.yaml",
    "components/cert-manager/certificates.yaml",
    "components/monitoring/scrape.yaml",
    "components/monitoring/rules.yaml",
    "components/monitoring/network.yaml",
];

fn assert_same(found: &BTreeMap<String, Value>, files: &[&str]) {
    let expected = by_name(manifests(files));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, document) in &expected {
        assert_eq!(&found[name], document, "{name}");
    }
}

#[test]
fn the_manifests_and_what_is_rendered_are_the_same() {
    let (job_set, _) = rendered(&deployment(Form::JobSet, Storage::Nothing, "base/job.toml"));
    assert_same(&job_set, &[&AROUND[..], &["jobset/jobset.yaml"]].concat());
    let (jobs, _) = rendered(&deployment(Form::Jobs, Storage::Nothing, "base/job.toml"));
    assert_same(&jobs, &[&AROUND[..], &["jobs/service.yaml", "jobs/coordinator.yaml", "jobs/worker.yaml"]].concat());
    let bucket = deployment(Form::JobSet, Storage::Bucket, "components/s3/job.toml");
    let (in_bucket, _) = rendered(&bucket);
    assert_same(&in_bucket, &[&AROUND[..], &["components/s3/network.yaml", "jobset/jobset.yaml"]].concat());
    let queued = Deployment { queue: Some("espalier".to_owned()), ..bucket };
    let (in_queue, _) = rendered(&queued);
    let queue = by_name(manifests(&["components/kueue/queue.yaml"]));
    assert_eq!(in_queue.get("\"LocalQueue\" \"espalier\""), queue.values().next());
    let label = &in_queue["\"JobSet\" \"espalier\""]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"];
    assert_eq!(label, "espalier");
}

/// A document as a patch of a component leaves it: the operations that ours are made of.
fn patched(mut document: Value, operations: &str) -> Value {
    for operation in documents(operations)[0].as_array().expect("a patch is a list of operations") {
        let text = |key: &str| operation[key].as_str().expect("an operation says what it does, and where");
        let (op, path, value) = (text("op"), text("path"), &operation["value"]);
        let (above, last) = path.rsplit_once('/').expect("a path begins at the root");
        let key = last.replace("~1", "/");
        let parent = document.pointer_mut(above).unwrap_or_else(|| panic!("nothing is at {above}"));
        match (op, parent) {
            ("test", parent) => assert_eq!(&parent[&key], value, "{path}"),
            ("add", Value::Array(values)) if key == "-" => values.push(value.clone()),
            ("add" | "replace", Value::Object(values)) => {
                let before = values.insert(key, value.clone());
                assert_eq!(before.is_some(), op == "replace", "{op} {path}");
            }
            (op, parent) => panic!("{op} at {path} of {parent}"),
        }
    }
    document
}

#[test]
fn workers_with_gpus_are_rendered_as_the_component_makes_them() {
    let component = &manifests(&["components/gpu/kustomization.yaml"])[0]["patches"];
    let patch_of = |kind: &str| {
        let patches = component.as_array().unwrap();
        let patch = patches.iter().find(|patch| patch["target"]["kind"] == kind).unwrap();
        patch["patch"].as_str().unwrap().to_owned()
    };
    for (form, kind, name, file) in [
        (Form::JobSet, "JobSet", "espalier", "jobset/jobset.yaml"),
        (Form::Jobs, "Job", "espalier-worker", "jobs/worker.yaml"),
    ] {
        let plain = deployment(form, Storage::Nothing, "base/job.toml");
        let with_gpu = Deployment { gpu: true, worker_image: "espalier-worker:0.1.0-cuda".to_owned(), ..plain };
        let (found, _) = rendered(&with_gpu);
        let of_file = by_name(manifests(&[file]));
        let key = format!("\"{kind}\" \"{name}\"");
        assert_eq!(found[&key], patched(of_file[&key].clone(), &patch_of(kind)), "{file}");
    }
}

#[test]
fn the_configuration_in_the_manifests_is_what_is_rendered() {
    let rendering = deployment(Form::JobSet, Storage::Bucket, "components/s3/job.toml");
    let (_, maps) = rendered(&rendering);
    let text = |map: &str, file: &str| {
        maps[&format!("\"ConfigMap\" \"espalier-{map}\"")]["data"][file].as_str().unwrap().to_owned()
    };
    let parsed = |text: &str| parse_document::<serde_json::Map<String, Value>>("rendered", text).unwrap();
    for file in ["coordinator.toml", "worker.toml"] {
        let base: serde_json::Map<String, Value> = load_document(&k8s(&format!("base/{file}"))).unwrap();
        assert_eq!(parsed(&text("config", file)), base, "{file}");
    }
    assert_eq!(parse_document::<JobSpec>("rendered", &text("job", "job.toml")).unwrap(), rendering.job);
    let variables = &maps["\"ConfigMap\" \"espalier-environment\""]["data"];
    let kustomization = &manifests(&["base/kustomization.yaml"])[0]["configMapGenerator"][2]["literals"];
    let literals: Vec<_> = kustomization.as_array().unwrap().iter().map(|pair| pair.as_str().unwrap()).collect();
    let pairs: Vec<_> = variables
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, value)| format!("{name}={}", value.as_str().unwrap()))
        .collect();
    assert_eq!(pairs, literals);
}

/// The same documents, in the form that every command has.
#[test]
fn manifests_are_one_document_of_json_too() {
    let workplace = Workplace::new();
    let job = k8s("base/job.toml");
    let asked = ["render", "k8s", job.to_str().unwrap(), "--worker-memory", "4GiB", "--claim", "models"];
    let run = |more: &[&str]| workplace.run([&asked[..], more].concat()).unwrap().success().unwrap();
    let list = run(&["--json"]).json().unwrap();
    assert_eq!((&list["apiVersion"], &list["kind"]), (&Value::from("v1"), &Value::from("List")));
    let documents = YamlLoader::load_from_str(&run(&[]).stdout).unwrap();
    let items = list["items"].as_array().unwrap();
    assert!(items.len() > 5 && !list.to_string().contains("null"), "{list}");
    let names = |kind: &str, name: &str| format!("{kind} {name}");
    let told: Vec<_> = items
        .iter()
        .map(|item| names(item["kind"].as_str().unwrap(), item["metadata"]["name"].as_str().unwrap()))
        .collect();
    let written: Vec<_> = documents
        .iter()
        .map(|one| names(one["kind"].as_str().unwrap(), one["metadata"]["name"].as_str().unwrap()))
        .collect();
    assert_eq!(told, written);
}

/// `espalier-worker methods | head` is no error.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    for listing in [&["methods"][..], &["devices", "--json"], &["config", "show"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output =
            std::process::Command::new(binary("espalier-worker")).args(listing).stdout(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{listing:?}");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{listing:?}");
    }
}

#[test]
fn the_reference_of_keys_is_what_the_types_say() {
    let expected = format!(
        "# Configuration\n\nEvery key of the two programs' files. `ESPALIER__SECTION__KEY` in the environment stands over the file, a flag over \
         both;\n`espalier config show` and `espalier-worker config show` tell what is in force and where each value is from. Made \
         from the\ntypes' comments: a test fails when it is not what `espalier config keys` and `espalier-worker config keys` \
         say.\n\n## `coordinator.toml`\n{}\n## `worker.toml`\n{}",
        reference::<CoordinatorConfig>(),
        reference::<WorkerConfig>()
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/CONFIG.md");
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if found != expected {
        let new = harness::process::target_folder().join("CONFIG.md");
        std::fs::write(&new, &expected).unwrap();
        panic!("deploy/CONFIG.md is not what the types say; {} is", new.display());
    }
}
