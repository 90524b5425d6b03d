//! The resources of Kubernetes that we write, as types: what is not in them cannot be written. Keys that are `None` are left out.

use std::collections::BTreeMap;

use serde::Serialize;

/// Names and values.
pub(super) type Pairs = BTreeMap<String, String>;

/// One document.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    pub(super) api_version: &'static str,
    pub(super) kind: &'static str,
    pub(super) metadata: Metadata,
    #[serde(flatten)]
    pub(super) body: Body,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    pub(super) name: Option<String>,
    pub(super) namespace: Option<String>,
    pub(super) labels: Pairs,
    pub(super) annotations: Option<Pairs>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(super) enum Body {
    Spec {
        spec: Box<Spec>,
    },
    Data {
        data: Pairs,
    },
    #[serde(rename_all = "camelCase")]
    Account {
        automount_service_account_token: bool,
    },
}

#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub(super) enum Spec {
    JobSet(JobSetSpec),
    Job(JobSpec),
    Service(ServiceSpec),
    NetworkPolicy(NetworkPolicySpec),
    LocalQueue(LocalQueueSpec),
    PodMonitor(PodMonitorSpec),
    PrometheusRule(PrometheusRuleSpec),
    Certificate(CertificateSpec),
    Issuer(IssuerSpec),
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSetSpec {
    pub(super) network: JobSetNetwork,
    pub(super) coordinator: JobSetCoordinator,
    pub(super) success_policy: JobSetSuccess,
    pub(super) failure_policy: JobSetFailure,
    pub(super) replicated_jobs: Vec<ReplicatedJob>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct JobSetNetwork {
    #[serde(rename = "enableDNSHostnames")]
    pub(super) enable_dns_hostnames: bool,
    #[serde(rename = "publishNotReadyAddresses")]
    pub(super) publish_not_ready_addresses: bool,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSetCoordinator {
    pub(super) replicated_job: &'static str,
    pub(super) job_index: u32,
    pub(super) pod_index: u32,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSetSuccess {
    pub(super) operator: &'static str,
    pub(super) target_replicated_jobs: Vec<&'static str>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSetFailure {
    pub(super) max_restarts: u32,
    pub(super) rules: Vec<JobSetRule>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSetRule {
    pub(super) name: &'static str,
    pub(super) action: &'static str,
    pub(super) on_job_failure_reasons: Option<Vec<&'static str>>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ReplicatedJob {
    pub(super) name: &'static str,
    pub(super) replicas: u32,
    pub(super) template: JobTemplate,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct JobTemplate {
    pub(super) metadata: Metadata,
    pub(super) spec: JobSpec,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct JobSpec {
    pub(super) completion_mode: &'static str,
    pub(super) completions: u32,
    pub(super) parallelism: u32,
    pub(super) backoff_limit: Option<u32>,
    pub(super) backoff_limit_per_index: Option<u32>,
    pub(super) max_failed_indexes: Option<u32>,
    pub(super) pod_replacement_policy: &'static str,
    pub(super) pod_failure_policy: PodFailurePolicy,
    pub(super) template: PodTemplate,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct PodFailurePolicy {
    pub(super) rules: Vec<PodFailureRule>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodFailureRule {
    pub(super) action: &'static str,
    pub(super) on_exit_codes: Option<ExitCodes>,
    pub(super) on_pod_conditions: Option<Vec<PodCondition>>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ExitCodes {
    pub(super) container_name: &'static str,
    pub(super) operator: &'static str,
    pub(super) values: Vec<u8>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct PodCondition {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) status: &'static str,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct PodTemplate {
    pub(super) metadata: Metadata,
    pub(super) spec: PodSpec,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSpec {
    pub(super) service_account_name: String,
    pub(super) automount_service_account_token: bool,
    pub(super) enable_service_links: bool,
    pub(super) restart_policy: &'static str,
    pub(super) subdomain: Option<String>,
    pub(super) termination_grace_period_seconds: u32,
    pub(super) security_context: PodSecurity,
    pub(super) tolerations: Option<Vec<Toleration>>,
    pub(super) containers: Vec<Container>,
    pub(super) volumes: Vec<Volume>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Toleration {
    pub(super) key: &'static str,
    pub(super) operator: &'static str,
    pub(super) effect: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodSecurity {
    pub(super) run_as_non_root: bool,
    pub(super) run_as_user: u32,
    pub(super) run_as_group: u32,
    pub(super) fs_group: u32,
    pub(super) fs_group_change_policy: &'static str,
    pub(super) seccomp_profile: Seccomp,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Seccomp {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Container {
    pub(super) name: &'static str,
    pub(super) image: String,
    pub(super) args: Vec<String>,
    pub(super) env: Option<Vec<Variable>>,
    pub(super) env_from: Vec<VariablesFrom>,
    pub(super) ports: Vec<ContainerPort>,
    pub(super) startup_probe: Probe,
    pub(super) readiness_probe: Probe,
    pub(super) liveness_probe: Probe,
    pub(super) resources: Resources,
    pub(super) security_context: ContainerSecurity,
    pub(super) volume_mounts: Vec<Mount>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Variable {
    pub(super) name: &'static str,
    pub(super) value_from: VariableSource,
}

/// Of the pod alone: there is no way to write a secret into a variable.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VariableSource {
    pub(super) field_ref: FieldRef,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct FieldRef {
    pub(super) field_path: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct VariablesFrom {
    pub(super) config_map_ref: Named,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) optional: Option<bool>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ContainerPort {
    pub(super) name: &'static str,
    pub(super) container_port: u16,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Probe {
    pub(super) http_get: HttpGet,
    pub(super) period_seconds: u32,
    pub(super) timeout_seconds: Option<u32>,
    pub(super) failure_threshold: Option<u32>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct HttpGet {
    pub(super) path: &'static str,
    pub(super) port: &'static str,
    pub(super) scheme: &'static str,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Resources {
    pub(super) requests: Quantities,
    pub(super) limits: Quantities,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Quantities {
    pub(super) cpu: String,
    pub(super) memory: String,
    pub(super) ephemeral_storage: String,
    #[serde(rename = "nvidia.com/gpu")]
    pub(super) gpus: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ContainerSecurity {
    pub(super) allow_privilege_escalation: bool,
    pub(super) read_only_root_filesystem: bool,
    pub(super) capabilities: Capabilities,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Capabilities {
    pub(super) drop: [&'static str; 1],
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) name: &'static str,
    pub(super) mount_path: &'static str,
    pub(super) read_only: Option<bool>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Volume {
    pub(super) name: &'static str,
    #[serde(flatten)]
    pub(super) source: VolumeSource,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum VolumeSource {
    ConfigMap {
        name: String,
    },
    #[serde(rename_all = "camelCase")]
    Secret {
        secret_name: String,
        default_mode: u32,
    },
    #[serde(rename_all = "camelCase")]
    Projected {
        default_mode: u32,
        sources: Vec<ProjectedSource>,
    },
    #[serde(rename_all = "camelCase")]
    EmptyDir {
        size_limit: String,
    },
    #[serde(rename_all = "camelCase")]
    PersistentVolumeClaim {
        claim_name: String,
    },
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ProjectedSource {
    pub(super) secret: Named,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ServiceSpec {
    #[serde(rename = "clusterIP")]
    pub(super) cluster_ip: &'static str,
    #[serde(rename = "publishNotReadyAddresses")]
    pub(super) publish_not_ready_addresses: bool,
    pub(super) selector: Pairs,
    pub(super) ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServicePort {
    pub(super) name: &'static str,
    pub(super) port: u16,
    pub(super) target_port: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Selector {
    pub(super) match_labels: Pairs,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NetworkPolicySpec {
    pub(super) pod_selector: Selector,
    pub(super) policy_types: Vec<&'static str>,
    pub(super) ingress: Option<Vec<Admission>>,
    pub(super) egress: Option<Vec<Admission>>,
}

/// Who may come in, or where one may go, and by which ports.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Admission {
    pub(super) from: Option<Vec<Peer>>,
    pub(super) to: Option<Vec<Peer>>,
    pub(super) ports: Vec<PolicyPort>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Peer {
    PodSelector(Selector),
    NamespaceSelector(Selector),
    IpBlock { cidr: &'static str, except: Vec<&'static str> },
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct PolicyPort {
    pub(super) protocol: &'static str,
    pub(super) port: u16,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct LocalQueueSpec {
    pub(super) cluster_queue: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodMonitorSpec {
    pub(super) selector: Selector,
    pub(super) pod_target_labels: Vec<&'static str>,
    pub(super) pod_metrics_endpoints: Vec<MetricsEndpoint>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MetricsEndpoint {
    pub(super) port: &'static str,
    pub(super) path: &'static str,
    pub(super) scheme: &'static str,
    pub(super) interval: &'static str,
    pub(super) relabelings: Vec<Relabeling>,
    pub(super) tls_config: ScrapeTls,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Relabeling {
    pub(super) source_labels: Vec<&'static str>,
    pub(super) target_label: &'static str,
    pub(super) replacement: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ScrapeTls {
    pub(super) server_name: String,
    pub(super) ca: SecretFile,
    pub(super) cert: SecretFile,
    pub(super) key_secret: SecretKey,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SecretFile {
    pub(super) secret: SecretKey,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct SecretKey {
    pub(super) name: String,
    pub(super) key: &'static str,
}

/// The groups are a file's: see [`super::yaml::parse`].
#[derive(Debug, Clone, Serialize)]
pub(super) struct PrometheusRuleSpec {
    pub(super) groups: serde_json::Value,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CertificateSpec {
    #[serde(rename = "isCA")]
    pub(super) is_ca: Option<bool>,
    pub(super) common_name: String,
    pub(super) secret_name: String,
    pub(super) duration: &'static str,
    pub(super) renew_before: Option<&'static str>,
    pub(super) usages: Option<Vec<&'static str>>,
    pub(super) dns_names: Option<Vec<String>>,
    pub(super) uris: Option<Vec<String>>,
    pub(super) private_key: PrivateKey,
    pub(super) issuer_ref: IssuerRef,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PrivateKey {
    pub(super) algorithm: &'static str,
    pub(super) size: u32,
    pub(super) rotation_policy: Option<&'static str>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct IssuerRef {
    pub(super) name: String,
    pub(super) kind: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum IssuerSpec {
    SelfSigned {},
    #[serde(rename_all = "camelCase")]
    Ca {
        secret_name: String,
    },
}
