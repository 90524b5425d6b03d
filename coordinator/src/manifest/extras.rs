//! What stands around the pods: account, configuration, who may talk to whom, certificates, a queue, and who watches.

use super::resource::{
    Admission, Body, CertificateSpec, IssuerRef, IssuerSpec, LocalQueueSpec, MetricsEndpoint, NetworkPolicySpec, Pairs,
    Peer, PodMonitorSpec, PolicyPort, PrivateKey, PrometheusRuleSpec, Relabeling, Resource, ScrapeTls, SecretFile,
    SecretKey, Selector, Spec,
};
use super::{COORDINATOR_PORT, Deployment, Role, Storage, WORKER_PORT, yaml};

/// The alerts that every Prometheus is to have, whether an operator brings them or not.
const RULES: &str = include_str!("../../../deploy/observability/rules.yaml");
/// The store's credentials, as the pods see them.
const CREDENTIALS: &str = "/etc/espalier/secrets/credentials";

impl Deployment {
    pub(super) fn account(&self) -> Resource {
        let body = Body::Account { automount_service_account_token: false };
        Resource { api_version: "v1", kind: "ServiceAccount", metadata: self.metadata(&self.name), body }
    }

    pub(super) fn config_maps(&self) -> [Resource; 3] {
        let map = |what: &str, data: Pairs| {
            let metadata = self.metadata(&format!("{}-{what}", self.name));
            Resource { api_version: "v1", kind: "ConfigMap", metadata, body: Body::Data { data } }
        };
        let file = |name: &str, text: String| (name.to_owned(), text);
        let job = toml::to_string_pretty(&self.job).expect("a job was read from the same format");
        [
            map(
                "config",
                [file("coordinator.toml", self.coordinator_toml()), file("worker.toml", self.worker_toml())].into(),
            ),
            map("job", [file("job.toml", job)].into()),
            map("environment", self.variables()),
        ]
    }

    /// What both programs find in their environment.
    fn variables(&self) -> Pairs {
        let mut variables = Pairs::from(
            [("HF_HOME", "/cache/huggingface"), ("HF_TOKEN_PATH", "/etc/espalier/secrets/token")].map(owned),
        );
        variables.extend(self.environment.clone());
        variables
    }

    fn coordinator_toml(&self) -> String {
        format!(
            "[coordinator]\nlisten = \"0.0.0.0:{COORDINATOR_PORT}\"\nworkers = {}\nworkers_patience_seconds = 1800\n\
             stored_every = 8\nworker_silence_seconds = 30\n{}",
            self.workers,
            common_toml(Role::Coordinator)
        )
    }

    fn worker_toml(&self) -> String {
        format!(
            "[worker]\nlisten = \"0.0.0.0:{WORKER_PORT}\"\nmemory_budget = {}\nscratch = \"/scratch\"\n\
             coordinator_silence_seconds = 600\n{}",
            self.sizes.memory_budget_bytes,
            common_toml(Role::Worker)
        )
    }

    pub(super) fn policies(&self) -> Vec<Resource> {
        let of = |role: Role| Peer::PodSelector(Selector { match_labels: self.labels_of(role) });
        let dns = to(
            Peer::NamespaceSelector(Selector {
                match_labels: Pairs::from([("kubernetes.io/metadata.name", "kube-system")].map(owned)),
            }),
            &[("UDP", 53), ("TCP", 53)],
        );
        let coordinator = NetworkPolicySpec {
            pod_selector: Selector { match_labels: self.labels_of(Role::Coordinator) },
            policy_types: vec!["Ingress", "Egress"],
            ingress: Some(vec![from(of(Role::Worker), COORDINATOR_PORT)]),
            egress: Some(vec![to(of(Role::Worker), &[("TCP", WORKER_PORT)]), dns.clone()]),
        };
        // Workers call each other: hidden states go from one to the next.
        let anyone = Peer::PodSelector(Selector { match_labels: self.labels() });
        let worker = NetworkPolicySpec {
            pod_selector: Selector { match_labels: self.labels_of(Role::Worker) },
            policy_types: vec!["Ingress", "Egress"],
            ingress: Some(vec![from(anyone, WORKER_PORT)]),
            egress: Some(vec![
                to(of(Role::Coordinator), &[("TCP", COORDINATOR_PORT)]),
                to(of(Role::Worker), &[("TCP", WORKER_PORT)]),
                dns,
            ]),
        };
        let mut policies = vec![self.policy("coordinator", coordinator), self.policy("worker", worker)];
        if self.storage == Storage::Bucket {
            // The machines' own metadata stay out of reach.
            let world = Peer::IpBlock { cidr: "0.0.0.0/0", except: vec!["169.254.0.0/16"] };
            let store = NetworkPolicySpec {
                pod_selector: Selector { match_labels: self.labels() },
                policy_types: vec!["Egress"],
                ingress: None,
                egress: Some(vec![to(world, &[("TCP", 443)])]),
            };
            policies.push(self.policy("store", store));
        }
        policies
    }

    fn policy(&self, what: &str, spec: NetworkPolicySpec) -> Resource {
        let metadata = self.metadata(&format!("{}-{what}", self.name));
        self.resource("networking.k8s.io/v1", "NetworkPolicy", metadata, Spec::NetworkPolicy(spec))
    }

    /// An authority of the namespace's own, and a certificate for each role.
    pub(super) fn certificates(&self) -> Vec<Resource> {
        let issuer =
            |name: &str, spec| self.resource("cert-manager.io/v1", "Issuer", self.metadata(name), Spec::Issuer(spec));
        let (selfsigned, authority) = (format!("{}-selfsigned", self.name), format!("{}-authority", self.name));
        let key = |rotation_policy| PrivateKey { algorithm: "ECDSA", size: 256, rotation_policy };
        let root = CertificateSpec {
            is_ca: Some(true),
            common_name: format!("{} authority", self.name),
            secret_name: authority.clone(),
            duration: "87600h",
            renew_before: None,
            usages: None,
            dns_names: None,
            uris: None,
            private_key: key(None),
            issuer_ref: IssuerRef { name: selfsigned.clone(), kind: "Issuer" },
        };
        let of_role = |role: &str, serves: bool| {
            let mut usages = if serves { vec!["server auth"] } else { Vec::new() };
            usages.extend(["client auth", "digital signature"]);
            let spec = CertificateSpec {
                is_ca: None,
                common_name: format!("{} {role}", self.name),
                secret_name: format!("{}-{role}-tls", self.name),
                duration: "2160h",
                renew_before: Some("720h"),
                usages: Some(usages),
                dns_names: serves.then(|| vec![format!("*.{}.{}.svc", self.name, self.namespace)]),
                uris: Some(vec![format!("espalier:role:{role}")]),
                private_key: key(Some("Always")),
                issuer_ref: IssuerRef { name: self.name.clone(), kind: "Issuer" },
            };
            self.certificate(&format!("{}-{role}", self.name), spec)
        };
        vec![
            issuer(&selfsigned, IssuerSpec::SelfSigned {}),
            self.certificate(&authority, root),
            issuer(&self.name, IssuerSpec::Ca { secret_name: authority.clone() }),
            of_role("coordinator", true),
            of_role("worker", true),
            of_role("viewer", false),
        ]
    }

    fn certificate(&self, name: &str, spec: CertificateSpec) -> Resource {
        self.resource("cert-manager.io/v1", "Certificate", self.metadata(name), Spec::Certificate(spec))
    }

    pub(super) fn local_queue(&self, queue: &str) -> Resource {
        let spec = Spec::LocalQueue(LocalQueueSpec { cluster_queue: "default" });
        self.resource("kueue.x-k8s.io/v1beta2", "LocalQueue", self.metadata(queue), spec)
    }

    pub(super) fn monitors(&self) -> [Resource; 3] {
        let secret = format!("{}-viewer-tls", self.name);
        let file = |key| SecretKey { name: secret.clone(), key };
        let endpoint = MetricsEndpoint {
            port: "http",
            path: "/metrics",
            scheme: "https",
            interval: "15s",
            // The rules tell coordinator and workers apart by their jobs.
            relabelings: vec![Relabeling {
                source_labels: vec!["__meta_kubernetes_pod_label_app_kubernetes_io_component"],
                target_label: "job",
                replacement: "espalier-$1",
            }],
            tls_config: ScrapeTls {
                // Any name below the service: a pod is scraped by its address.
                server_name: format!("metrics.{}.{}.svc", self.name, self.namespace),
                ca: SecretFile { secret: file("ca.crt") },
                cert: SecretFile { secret: file("tls.crt") },
                key_secret: file("tls.key"),
            },
        };
        let scrape = PodMonitorSpec {
            selector: Selector { match_labels: self.labels() },
            pod_target_labels: vec!["app.kubernetes.io/component"],
            pod_metrics_endpoints: vec![endpoint],
        };
        let rules = PrometheusRuleSpec { groups: yaml::parse(RULES)["groups"].take() };
        let scraper = Peer::NamespaceSelector(Selector {
            match_labels: Pairs::from([("kubernetes.io/metadata.name", "monitoring")].map(owned)),
        });
        let admitted = NetworkPolicySpec {
            pod_selector: Selector { match_labels: self.labels() },
            policy_types: vec!["Ingress"],
            ingress: Some(vec![Admission {
                from: Some(vec![scraper]),
                to: None,
                ports: ports(&[("TCP", Role::Coordinator.http_port()), ("TCP", Role::Worker.http_port())]),
            }]),
            egress: None,
        };
        let api = "monitoring.coreos.com/v1";
        [
            self.resource(api, "PodMonitor", self.metadata(&self.name), Spec::PodMonitor(scrape)),
            self.resource(api, "PrometheusRule", self.metadata(&self.name), Spec::PrometheusRule(rules)),
            self.policy("metrics", admitted),
        ]
    }
}

/// What both files of configuration end with.
fn common_toml(role: Role) -> String {
    format!(
        "\n[tls]\nfolder = \"/etc/espalier/tls\"\n\n[http]\nlisten = \"0.0.0.0:{}\"\n\n\
         [log]\nformat = \"json\"\nfilter = \"info\"\n",
        role.http_port()
    )
}

/// Variables by which the pods find a store's credentials, for the kind of store that a URL names.
pub fn credentials_variable(url: &str) -> Option<(String, String)> {
    let variable = match url.split_once("://")?.0 {
        "s3" | "s3a" => "AWS_SHARED_CREDENTIALS_FILE",
        "gs" => "GOOGLE_APPLICATION_CREDENTIALS",
        _ => return None,
    };
    Some((variable.to_owned(), CREDENTIALS.to_owned()))
}

fn owned((key, value): (&str, &str)) -> (String, String) {
    (key.to_owned(), value.to_owned())
}

fn ports(ports: &[(&'static str, u16)]) -> Vec<PolicyPort> {
    ports.iter().map(|(protocol, port)| PolicyPort { protocol, port: *port }).collect()
}

fn from(peer: Peer, port: u16) -> Admission {
    Admission { from: Some(vec![peer]), to: None, ports: ports(&[("TCP", port)]) }
}

fn to(peer: Peer, allowed: &[(&'static str, u16)]) -> Admission {
    Admission { from: None, to: Some(vec![peer]), ports: ports(allowed) }
}
