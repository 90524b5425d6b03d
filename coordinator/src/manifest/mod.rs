//! What a job is on Kubernetes: the manifests of `deploy/k8s`, for one job and its sizes. Pure: a deployment in, documents out.
//!
//! A test holds them equal to the files there, so that neither says what the other does not.

mod extras;
mod pods;
mod resource;
pub mod yaml;

use std::collections::BTreeMap;

use espalier_common::job::JobSpec;
use espalier_common::store;

use resource::{
    Body, JobSetCoordinator, JobSetFailure, JobSetNetwork, JobSetRule, JobSetSpec, JobSetSuccess, Metadata, Pairs,
    ReplicatedJob, ServicePort, ServiceSpec, Spec,
};

pub use extras::credentials_variable;
pub use resource::Resource;

/// Where coordinator, workers and probes are reached.
const COORDINATOR_PORT: u16 = 7433;
const WORKER_PORT: u16 = 7434;

/// One of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Decides.
    Coordinator,
    /// Computes.
    Worker,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Coordinator => "coordinator",
            Self::Worker => "worker",
        }
    }

    fn port(self) -> u16 {
        match self {
            Self::Coordinator => COORDINATOR_PORT,
            Self::Worker => WORKER_PORT,
        }
    }

    /// Pages and probes.
    fn http_port(self) -> u16 {
        match self {
            Self::Coordinator => 9433,
            Self::Worker => 9434,
        }
    }
}

/// As what the pods are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A JobSet: needs its controller, and starts again only what was lost.
    JobSet,
    /// Two Indexed Jobs and a headless Service: needs nothing but Kubernetes.
    Jobs,
}

/// Where model, texts, run and result are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// In an object store, or on the hub.
    Bucket,
    /// On a volume that all pods mount at `/data`, by the name of its claim.
    Claim(String),
    /// On a volume that goes with its pod, as in the files that a component completes.
    Nothing,
}

/// What a worker gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Processors, which are compute threads.
    pub cpus: u32,
    /// Memory, in GiB.
    pub memory_gib: u64,
    /// Bytes of hidden states that stay in it.
    pub memory_budget_bytes: u64,
    /// Room for those that do not, in GiB.
    pub scratch_gib: u64,
    /// Room for a model of the hub, in GiB; the coordinator has as much.
    pub cache_gib: u64,
}

/// A job on a cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Deployment {
    /// Names everything.
    pub name: String,
    /// Where it goes.
    pub namespace: String,
    /// As what.
    pub form: Form,
    /// The coordinator's image.
    pub coordinator_image: String,
    /// The workers' image.
    pub worker_image: String,
    /// How many workers.
    pub workers: u32,
    /// What each gets.
    pub sizes: Sizes,
    /// Whether each also gets a GPU of its own, which its image must be made for.
    pub gpu: bool,
    /// The job.
    pub job: JobSpec,
    /// Where the run is, if not beside the output.
    pub run: Option<String>,
    /// Where everything else is.
    pub storage: Storage,
    /// Variables that tell where the store is; no secrets.
    pub environment: BTreeMap<String, String>,
    /// Kueue's queue that it waits in.
    pub queue: Option<String>,
    /// Whether Prometheus watches.
    pub monitoring: bool,
    /// Whether cert-manager makes the certificates.
    pub cert_manager: bool,
}

/// Why a job cannot be run as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// No name of Kubernetes.
    #[error(
        "{key} is {value}, but must be lower-case letters, digits and dashes, {most} at most, and begin with a letter"
    )]
    Name {
        /// What is named so.
        key: &'static str,
        /// The name.
        value: String,
        /// Its longest.
        most: usize,
    },
    /// A path that no pod has.
    #[error("{key} is {value}, which no pod has: give a URL, or --claim and a path below /data")]
    Path {
        /// The job's key.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// A secret where everybody reads it.
    #[error("--environment {name} is a secret: keys go into the secret espalier-store, see deploy/README.md")]
    Secret {
        /// The variable.
        name: String,
    },
}

impl Deployment {
    /// The documents, in the order in which they are to be applied.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn documents(&self) -> Result<Vec<Resource>, ManifestError> {
        self.check()?;
        let mut documents = vec![self.account()];
        documents.extend(self.config_maps());
        documents.extend(self.policies());
        if self.cert_manager {
            documents.extend(self.certificates());
        }
        if let Some(queue) = &self.queue {
            documents.push(self.local_queue(queue));
        }
        if self.monitoring {
            documents.extend(self.monitors());
        }
        match self.form {
            Form::JobSet => documents.push(self.job_set()),
            Form::Jobs => {
                documents.push(self.service());
                documents.extend([Role::Coordinator, Role::Worker].map(|role| {
                    let name = format!("{}-{}", self.name, role.name());
                    let mut metadata = self.metadata(&name);
                    metadata.labels.insert(COMPONENT.to_owned(), role.name().to_owned());
                    metadata.labels.extend(self.queue_label());
                    self.resource("batch/v1", "Job", metadata, Spec::Job(self.job_of(role)))
                }));
            }
        }
        Ok(documents)
    }

    fn check(&self) -> Result<(), ManifestError> {
        // A pod is called NAME-coordinator-0-0, and 63 is a label's longest.
        for (key, value, most) in [("--name", &self.name, 40), ("--namespace", &self.namespace, 63)] {
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            let legal = value.len() <= most
                && value.chars().all(plain)
                && value.starts_with(|c: char| c.is_ascii_lowercase())
                && !value.ends_with('-');
            if !legal {
                return Err(ManifestError::Name { key, value: value.clone(), most });
            }
        }
        let run = self.run.as_deref().map(|run| ("--run", run));
        let evaluation = self.job.evaluation.as_ref().map(|spec| ("[evaluation] source", spec.source.as_str()));
        let places = [
            ("[model] source", self.job.model.source.as_str()),
            ("[calibration] source", self.job.calibration.source.as_str()),
            ("[output] uri", self.job.output.uri.as_str()),
        ];
        let on_volume = |place: &str| self.storage != Storage::Bucket && place.starts_with("/data/");
        let reached = |place: &str| store::is_object_url(place) || place.starts_with("hf://") || on_volume(place);
        if let Some((key, value)) = places.into_iter().chain(run).chain(evaluation).find(|(_, place)| !reached(place)) {
            return Err(ManifestError::Path { key, value: value.to_owned() });
        }
        let secret = |name: &&String| {
            let words = ["TOKEN", "SECRET", "PASSWORD", "ACCESS_KEY", "ACCOUNT_KEY"];
            words.iter().any(|word| name.contains(word)) && !name.ends_with("_FILE") && !name.ends_with("_PATH")
        };
        match self.environment.keys().find(secret) {
            Some(name) => Err(ManifestError::Secret { name: name.clone() }),
            None => Ok(()),
        }
    }

    /// Labels that all of its objects have.
    fn labels(&self) -> Pairs {
        let pairs = [("app.kubernetes.io/name", "espalier"), ("app.kubernetes.io/instance", self.name.as_str())];
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into()
    }

    fn labels_of(&self, role: Role) -> Pairs {
        let mut labels = self.labels();
        labels.insert(COMPONENT.to_owned(), role.name().to_owned());
        labels
    }

    fn queue_label(&self) -> Option<(String, String)> {
        self.queue.clone().map(|queue| ("kueue.x-k8s.io/queue-name".to_owned(), queue))
    }

    fn metadata(&self, name: &str) -> Metadata {
        let namespace = Some(self.namespace.clone());
        Metadata { name: Some(name.to_owned()), namespace, labels: self.labels(), annotations: None }
    }

    fn resource(&self, api_version: &'static str, kind: &'static str, metadata: Metadata, spec: Spec) -> Resource {
        Resource { api_version, kind, metadata, body: Body::Spec { spec: Box::new(spec) } }
    }

    /// The host of the only coordinator, or of a worker by what stands for its number.
    fn host(&self, role: Role, index: &str) -> String {
        let (name, role) = (&self.name, role.name());
        let pod = match self.form {
            Form::JobSet => format!("{name}-{role}-0-{index}"),
            Form::Jobs => format!("{name}-{role}-{index}"),
        };
        format!("{pod}.{name}.$(NAMESPACE).svc")
    }

    fn job_set(&self) -> Resource {
        let again = |name, action, reasons| JobSetRule { name, action, on_job_failure_reasons: reasons };
        let replicated = |role: Role| {
            let labels = self.labels_of(role);
            let metadata = Metadata { labels, ..Metadata::default() };
            let template = resource::JobTemplate { metadata, spec: self.job_of(role) };
            ReplicatedJob { name: role.name(), replicas: 1, template }
        };
        let spec = JobSetSpec {
            network: JobSetNetwork { enable_dns_hostnames: true, publish_not_ready_addresses: true },
            coordinator: JobSetCoordinator { replicated_job: Role::Coordinator.name(), job_index: 0, pod_index: 0 },
            success_policy: JobSetSuccess { operator: "All", target_replicated_jobs: vec![Role::Coordinator.name()] },
            failure_policy: JobSetFailure {
                max_restarts: 5,
                rules: vec![
                    again("hopeless", "FailJobSet", Some(vec!["PodFailurePolicy"])),
                    again("lost", "RestartJob", None),
                ],
            },
            replicated_jobs: vec![replicated(Role::Coordinator), replicated(Role::Worker)],
        };
        let mut metadata = self.metadata(&self.name);
        metadata.labels.extend(self.queue_label());
        self.resource("jobset.x-k8s.io/v1alpha2", "JobSet", metadata, Spec::JobSet(spec))
    }

    fn service(&self) -> Resource {
        let port = |name, port, target_port| ServicePort { name, port, target_port };
        let spec = ServiceSpec {
            cluster_ip: "None",
            publish_not_ready_addresses: true,
            selector: self.labels(),
            ports: vec![
                port("coordinator", COORDINATOR_PORT, "grpc"),
                port("http", Role::Coordinator.http_port(), "http"),
            ],
        };
        self.resource("v1", "Service", self.metadata(&self.name), Spec::Service(spec))
    }
}

/// The label that tells coordinator and workers apart.
const COMPONENT: &str = "app.kubernetes.io/component";

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn deployment() -> Deployment {
        let job = serde_json::json!({
            "model": {"source": "s3://b/model"}, "calibration": {"source": "s3://b/c.jsonl"}, "output": {"uri": "s3://b/out"}
        });
        Deployment {
            name: "espalier".to_owned(),
            namespace: "espalier".to_owned(),
            form: Form::JobSet,
            coordinator_image: "c:1".to_owned(),
            worker_image: "w:1".to_owned(),
            workers: 3,
            sizes: Sizes { cpus: 8, memory_gib: 32, memory_budget_bytes: 8 << 30, scratch_gib: 100, cache_gib: 32 },
            gpu: false,
            job: serde_json::from_value(job).unwrap(),
            run: None,
            storage: Storage::Bucket,
            environment: BTreeMap::new(),
            queue: None,
            monitoring: false,
            cert_manager: false,
        }
    }

    #[test]
    fn paths_that_no_pod_has_are_refused_by_their_key() {
        let mut wrong = deployment();
        wrong.job.calibration.source = "calibration.jsonl".to_owned();
        let error = wrong.documents().unwrap_err().to_string();
        assert!(error.contains("[calibration] source is calibration.jsonl"), "{error}");
        wrong.job.calibration.source = "/data/calibration.jsonl".to_owned();
        assert!(wrong.documents().is_err(), "nothing is mounted at /data");
        wrong.storage = Storage::Claim("models".to_owned());
        wrong.documents().unwrap();
        wrong.run = Some("/elsewhere".to_owned());
        assert!(wrong.documents().unwrap_err().to_string().starts_with("--run is /elsewhere"));
    }

    #[test]
    fn names_and_variables_that_will_not_do_are_refused() {
        for name in ["", "Espalier", "7up", "a_b", "a-", &"a".repeat(41)] {
            let wrong = Deployment { name: name.to_owned(), ..deployment() };
            assert!(matches!(wrong.documents(), Err(ManifestError::Name { key: "--name", .. })), "{name}");
        }
        for (name, refused) in [("AWS_SECRET_ACCESS_KEY", true), ("AWS_REGION", false), ("HF_TOKEN_PATH", false)] {
            let mut wrong = deployment();
            wrong.environment.insert(name.to_owned(), "x".to_owned());
            assert_eq!(wrong.documents().is_err(), refused, "{name}");
        }
    }
}
