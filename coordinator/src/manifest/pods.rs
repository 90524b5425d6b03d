//! The two kinds of pods, and the jobs that they are of.

use super::resource::{
    Capabilities, Container, ContainerPort, ContainerSecurity, ExitCodes, FieldRef, HttpGet, JobSpec, Metadata, Mount,
    Named, Pairs, PodCondition, PodFailurePolicy, PodFailureRule, PodSecurity, PodSpec, PodTemplate, Probe,
    ProjectedSource, Quantities, Resources, Seccomp, Toleration, Variable, VariableSource, VariablesFrom, Volume,
    VolumeSource,
};
use super::{Deployment, Form, Role, Storage};
use crate::error::exit;

/// Nobody's: as distroless images call their user.
const USER: u32 = 65_532;
/// 0440: a key that everybody could read is refused.
const SECRET_MODE: u32 = 0o440;
/// Tries of a coordinator, or of one worker, that ended by itself with a code that may be tried again.
const TRIES: u32 = 10;
/// A GPU, and the taint of machines that have some.
const GPU: &str = "nvidia.com/gpu";
/// For logs, beside what emptyDirs hold.
const LOGS_GIB: u64 = 3;
const TMP_GIB: u64 = 4;
/// Of a coordinator, which holds no weights.
const COORDINATOR_MEMORY_GIB: u64 = 4;

impl Deployment {
    /// The job of one kind of pods.
    pub(super) fn job_of(&self, role: Role) -> JobSpec {
        let count = self.count(role);
        let is_worker = role == Role::Worker;
        let on_codes = |action, values| PodFailureRule {
            action,
            on_exit_codes: Some(ExitCodes { container_name: role.name(), operator: "In", values }),
            on_pod_conditions: None,
        };
        let disrupted = PodCondition { kind: "DisruptionTarget", status: "True" };
        let on_disruption =
            PodFailureRule { action: "Ignore", on_exit_codes: None, on_pod_conditions: Some(vec![disrupted]) };
        JobSpec {
            completion_mode: "Indexed",
            completions: count,
            parallelism: count,
            backoff_limit: (!is_worker).then_some(TRIES),
            backoff_limit_per_index: is_worker.then_some(TRIES),
            max_failed_indexes: is_worker.then_some(count),
            pod_replacement_policy: "Failed",
            pod_failure_policy: PodFailurePolicy {
                rules: vec![
                    on_codes("FailJob", vec![exit::USAGE, exit::REJECTED, exit::BUG]),
                    on_disruption,
                    on_codes("Count", vec![exit::INTERRUPTED]),
                ],
            },
            template: PodTemplate { metadata: self.pod_metadata(role), spec: self.pod(role) },
        }
    }

    fn has_gpu(&self, role: Role) -> bool {
        self.gpu && role == Role::Worker
    }

    fn count(&self, role: Role) -> u32 {
        if role == Role::Worker { self.workers } else { 1 }
    }

    fn pod_metadata(&self, role: Role) -> Metadata {
        let evict = ("cluster-autoscaler.kubernetes.io/safe-to-evict".to_owned(), "false".to_owned());
        let annotations = (role == Role::Coordinator).then(|| Pairs::from([evict]));
        Metadata { labels: self.labels_of(role), annotations, ..Metadata::default() }
    }

    fn pod(&self, role: Role) -> PodSpec {
        let volumes = self.volumes(role);
        PodSpec {
            service_account_name: self.name.clone(),
            automount_service_account_token: false,
            enable_service_links: false,
            restart_policy: "Never",
            subdomain: (self.form == Form::Jobs).then(|| self.name.clone()),
            termination_grace_period_seconds: if role == Role::Worker { 30 } else { 45 },
            security_context: PodSecurity {
                run_as_non_root: true,
                run_as_user: USER,
                run_as_group: USER,
                fs_group: USER,
                fs_group_change_policy: "OnRootMismatch",
                seccomp_profile: Seccomp { kind: "RuntimeDefault" },
            },
            // Machines with GPUs are kept free of what needs none.
            tolerations: self
                .has_gpu(role)
                .then(|| vec![Toleration { key: GPU, operator: "Exists", effect: "NoSchedule" }]),
            containers: vec![self.container(role)],
            volumes,
        }
    }

    fn container(&self, role: Role) -> Container {
        let variables = vec![VariablesFrom { config_map_ref: named(format!("{}-environment", self.name)) }];
        let namespace = Variable {
            name: "NAMESPACE",
            value_from: VariableSource { field_ref: FieldRef { field_path: "metadata.namespace" } },
        };
        let port = |name, container_port| ContainerPort { name, container_port };
        let image = if role == Role::Worker { &self.worker_image } else { &self.coordinator_image };
        Container {
            name: role.name(),
            image: image.clone(),
            args: self.arguments(role),
            env: (role == Role::Worker).then(|| vec![namespace]),
            env_from: variables,
            ports: vec![port("grpc", role.port()), port("http", role.http_port())],
            startup_probe: Probe { failure_threshold: Some(60), ..probe("/healthz", 2) },
            readiness_probe: probe("/readyz", 5),
            liveness_probe: Probe { timeout_seconds: Some(5), failure_threshold: Some(6), ..probe("/healthz", 10) },
            resources: self.resources(role),
            security_context: ContainerSecurity {
                allow_privilege_escalation: false,
                read_only_root_filesystem: true,
                capabilities: Capabilities { drop: ["ALL"] },
            },
            volume_mounts: mounts(role),
        }
    }

    fn arguments(&self, role: Role) -> Vec<String> {
        match role {
            Role::Coordinator => {
                let mut arguments = vec![
                    "coordinator".to_owned(),
                    "--config=/etc/espalier/config/coordinator.toml".to_owned(),
                    "--job=/etc/espalier/job/job.toml".to_owned(),
                ];
                arguments.extend(self.run.as_ref().map(|run| format!("--run={run}")));
                arguments
            }
            Role::Worker => vec![
                "serve".to_owned(),
                "--config=/etc/espalier/config/worker.toml".to_owned(),
                format!("--coordinator=https://{}:{}", self.host(Role::Coordinator, "0"), Role::Coordinator.port()),
                format!("--advertise={}", self.host(Role::Worker, "$(JOB_COMPLETION_INDEX)")),
                "--name=worker-$(JOB_COMPLETION_INDEX)".to_owned(),
            ]
            .into_iter()
            // A pod that was given a GPU and cannot use it ends, rather than computing on the CPU at its price.
            .chain(self.gpu.then(|| "--device=cuda:0".to_owned()))
            .collect(),
        }
    }

    fn resources(&self, role: Role) -> Resources {
        let (cpu, most_cpu, memory) = match role {
            Role::Coordinator => (1, 2, COORDINATOR_MEMORY_GIB),
            Role::Worker => (self.sizes.cpus, self.sizes.cpus, self.sizes.memory_gib),
        };
        let storage = LOGS_GIB + self.empty_gib(role).into_iter().map(|(_, gib)| gib).sum::<u64>();
        let quantities = |cpu: u32| Quantities {
            cpu: cpu.to_string(),
            memory: gib(memory),
            ephemeral_storage: gib(storage),
            gpus: self.has_gpu(role).then(|| "1".to_owned()),
        };
        Resources { requests: quantities(cpu), limits: quantities(most_cpu) }
    }

    /// Volumes that are empty at first and go with the pod, and how large each may grow.
    fn empty_gib(&self, role: Role) -> Vec<(&'static str, u64)> {
        // Where a claim takes its place, there is room to spare.
        let mut volumes = vec![("data", 1), ("cache", self.sizes.cache_gib)];
        volumes.extend((role == Role::Worker).then_some(("scratch", self.sizes.scratch_gib)));
        volumes.push(("tmp", TMP_GIB));
        volumes
    }

    fn volumes(&self, role: Role) -> Vec<Volume> {
        let volume = |name, source| Volume { name, source };
        let optional = |name: &str| ProjectedSource { secret: Named { name: name.to_owned(), optional: Some(true) } };
        let config_map = |what: &str| VolumeSource::ConfigMap { name: format!("{}-{what}", self.name) };
        let mut volumes = vec![volume("config", config_map("config"))];
        volumes.extend((role == Role::Coordinator).then(|| volume("job", config_map("job"))));
        let secret_name = format!("{}-{}-tls", self.name, role.name());
        volumes.push(volume("tls", VolumeSource::Secret { secret_name, default_mode: SECRET_MODE }));
        let sources = vec![optional("espalier-store"), optional("espalier-hub")];
        volumes.push(volume("secrets", VolumeSource::Projected { default_mode: SECRET_MODE, sources }));
        volumes.extend(self.empty_gib(role).into_iter().map(|(name, size)| match (&self.storage, name) {
            (Storage::Claim(claim), "data") => {
                volume(name, VolumeSource::PersistentVolumeClaim { claim_name: claim.clone() })
            }
            _ => volume(name, VolumeSource::EmptyDir { size_limit: gib(size) }),
        }));
        volumes
    }
}

fn gib(count: u64) -> String {
    format!("{count}Gi")
}

fn named(name: String) -> Named {
    Named { name, optional: None }
}

/// Over HTTPS and not by gRPC: the kubelet has no certificate, and these pages need none.
fn probe(path: &'static str, period_seconds: u32) -> Probe {
    Probe { http_get: HttpGet { path, port: "http", scheme: "HTTPS" }, period_seconds, ..Probe::default() }
}

fn mounts(role: Role) -> Vec<Mount> {
    let to_read = |name, mount_path| Mount { name, mount_path, read_only: Some(true) };
    let to_write = |name, mount_path| Mount { name, mount_path, read_only: None };
    let mut mounts = vec![to_read("config", "/etc/espalier/config")];
    mounts.extend((role == Role::Coordinator).then(|| to_read("job", "/etc/espalier/job")));
    mounts.extend([to_read("tls", "/etc/espalier/tls"), to_read("secrets", "/etc/espalier/secrets")]);
    mounts.extend([to_write("data", "/data"), to_write("cache", "/cache")]);
    mounts.extend((role == Role::Worker).then(|| to_write("scratch", "/scratch")));
    mounts.push(to_write("tmp", "/tmp"));
    mounts
}
