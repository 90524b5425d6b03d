"""Holds the Kubernetes manifests against schemas, against each other and against the programs.

    manifests.py BINARIES        check deploy/k8s and what `espalier render k8s` writes

BINARIES is the folder of `espalier` and `espalier-worker`. Everything is checked offline: schemas of Kubernetes come with the
Python package kubernetes-validate, those of other resources from tests/golden/k8s. Before anything is believed, faults are
planted in manifests that pass, and each must be found, by the check that is there for it.
"""

import copy
import fnmatch
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

import jsonschema
import kubernetes_validate
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "deploy/k8s"
VERSIONS = ["1.30", "1.32", "1.34", "1.37"]
SCHEMAS = {
    (schema["properties"]["apiVersion"]["const"], schema["properties"]["kind"]["const"]): schema
    for schema in (json.loads(path.read_text()) for path in (REPOSITORY / "tests/golden/k8s").glob("*.json"))
}
# Ports that belong to others: DNS, and stores behind TLS.
FOREIGN_PORTS = {53, 443}
# Exit codes, as README.md has them.
HOPELESS, AGAIN = {2, 65, 70}, {75}


def documents(text):
    return [document for document in yaml.safe_load_all(text) if document]


def named(document):
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


# --- schemas ---------------------------------------------------------------------------------------------------------------


def against_kubernetes(document, version):
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{named(document)} (Kubernetes {version}): {'.'.join(map(str, error.path))}: {error.message}"


def schemas(documents):
    for document in documents:
        schema = SCHEMAS.get((document.get("apiVersion"), document.get("kind")))
        if schema is None:
            if "." in document["apiVersion"].split("/")[0] and not document["apiVersion"].split("/")[0].endswith(".k8s.io"):
                yield f"{named(document)}: there is no schema for {document['apiVersion']}"
                continue
            for version in VERSIONS:
                yield from against_kubernetes(document, version)
            continue
        for error in jsonschema.Draft7Validator(schema).iter_errors(document):
            yield f"{named(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for job in document["spec"].get("replicatedJobs", []) if document["kind"] == "JobSet" else []:
            template = {"apiVersion": "batch/v1", "kind": "Job", **copy.deepcopy(job.get("template", {}))}
            template["metadata"] = {"name": f"{document['metadata']['name']}-{job['name']}", **template.get("metadata", {})}
            for version in VERSIONS:
                yield from against_kubernetes(template, version)


# --- our own rules ---------------------------------------------------------------------------------------------------------


class Pods:
    """One kind of pods: the job they are of, and the names that they get."""

    def __init__(self, job, name, hosts, metadata):
        self.job, self.name, self.hosts = job, name, hosts
        self.template = job["template"]
        self.spec = self.template["spec"]
        self.labels = self.template.get("metadata", {}).get("labels", {})
        self.role = self.labels.get("app.kubernetes.io/component")
        self.metadata = metadata

    def container(self):
        return self.spec["containers"][0]

    def ports(self):
        return {port["name"]: port["containerPort"] for port in self.container().get("ports", [])}


def pods(documents):
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] == "JobSet":
            for job in document["spec"]["replicatedJobs"]:
                host = f"{name}-{job['name']}-0-{{index}}.{name}"
                yield Pods(job["template"]["spec"], f"{name}/{job['name']}", host, document["metadata"])
        elif document["kind"] == "Job":
            spec = document["spec"]
            host = f"{name}-{{index}}.{spec['template']['spec'].get('subdomain')}"
            yield Pods(spec, name, host, document["metadata"])


def hardened(pod):
    spec, security = pod.spec, pod.spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not isinstance(security.get("runAsUser"), int) or security["runAsUser"] < 1:
        yield "has to run as a numbered user that is not root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "needs the seccomp profile RuntimeDefault"
    if spec.get("automountServiceAccountToken") is not False:
        yield "gets a service account's token"
    if spec.get("enableServiceLinks") is not False:
        yield "gets variables of services"
    if spec.get("restartPolicy") != "Never":
        yield "needs restartPolicy Never, for podFailurePolicy to see how it ended"
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"has {key}"
    for container in spec["containers"] + spec.get("initContainers", []):
        security = container.get("securityContext", {})
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities", {}).get("drop") != ["ALL"]:
            yield "may gain privileges"
        if security.get("readOnlyRootFilesystem") is not True:
            yield "can write its root file system"
        if container["image"].endswith(":latest") or not re.search(r"(:[\w.-]+|@sha256:[0-9a-f]{64})$", container["image"]):
            yield f"image {container['image']} says no version"
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is the machine's"


def quantity(text):
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()
    units = {"": 1, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return float(number) * units[unit]


def bounded(pod):
    for container in pod.spec["containers"]:
        limits = container.get("resources", {}).get("limits", {})
        for what in ("cpu", "memory", "ephemeral-storage"):
            if what not in limits:
                yield f"has no limit of {what}"
    room = sum(quantity(volume["emptyDir"].get("sizeLimit", "1000Ti")) for volume in pod.spec.get("volumes", []) if "emptyDir" in volume)
    limit = quantity(pod.container().get("resources", {}).get("limits", {}).get("ephemeral-storage", 0))
    if room > limit:
        yield f"has {room / 2**30:.0f} GiB of emptyDir, but {limit / 2**30:.0f} GiB of ephemeral-storage"


def uses_its_gpu(pod):
    """A GPU is paid for if it is limited to, and used if the worker is told so: neither without the other."""
    container = pod.container()
    limited = {kind: container.get("resources", {}).get(kind, {}).get("nvidia.com/gpu") for kind in ("requests", "limits")}
    asked = [argument for argument in container.get("args", []) if argument.startswith("--device=cuda")]
    if set(limited.values()) != {"1" if asked else None}:
        yield f"computes on {asked or 'the CPU'} with GPUs {limited}"


def keeps_secrets_in_files(pod):
    for container in pod.spec["containers"]:
        for source in container.get("envFrom", []):
            if "secretRef" in source:
                yield "has a secret among its variables"
        for variable in container.get("env", []):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                yield f"has a secret in the variable {variable['name']}"
            if re.search(r"TOKEN$|SECRET|PASSWORD|ACCESS_KEY", variable["name"]) and "value" in variable:
                yield f"has a secret in the variable {variable['name']}"


def mounts(pod):
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounted = {mount["name"] for mount in pod.container().get("volumeMounts", [])}
    for name in mounted - volumes.keys():
        yield f"mounts {name}, which is no volume"
    for name in volumes.keys() - mounted:
        yield f"has the volume {name}, which is not mounted"
    temporary = [mount["name"] for mount in pod.container().get("volumeMounts", []) if mount["mountPath"] == "/tmp"]
    if not temporary or "emptyDir" not in volumes.get(temporary[0], {}):
        yield "needs an emptyDir at /tmp"


def fails_well(pod):
    rules = pod.job.get("podFailurePolicy", {}).get("rules", [])
    codes = {}
    for rule in rules:
        if "onExitCodes" in rule:
            if rule["onExitCodes"].get("containerName") != pod.container()["name"]:
                yield "podFailurePolicy names another container"
            for code in rule["onExitCodes"]["values"]:
                codes.setdefault(code, rule["action"])
    if {code for code, action in codes.items() if action == "FailJob"} != HOPELESS:
        yield f"podFailurePolicy has to fail at once at {sorted(HOPELESS)} and at nothing else"
    if any(codes.get(code) not in ("Count", "Ignore") for code in AGAIN):
        yield f"podFailurePolicy has to try again at {sorted(AGAIN)}"
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    if not any(rule["action"] == "Ignore" and disrupted in rule.get("onPodConditions", []) for rule in rules):
        yield "podFailurePolicy has to ignore disruptions"


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def selectors(documents):
    known = list(pods(documents))

    def check(document, selector, what):
        if not any(selects(selector, pod.labels) for pod in known):
            yield f"{named(document)}: {what} selects no pod"

    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "NetworkPolicy":
            yield from check(document, spec["podSelector"], "podSelector")
            for rule in spec.get("ingress", []) + spec.get("egress", []):
                for peer in rule.get("from", []) + rule.get("to", []):
                    if "podSelector" in peer:
                        yield from check(document, peer["podSelector"], "a peer")
                for port in rule.get("ports", []):
                    ours = {number for pod in known for number in pod.ports().values()}
                    if port["port"] not in ours | FOREIGN_PORTS:
                        yield f"{named(document)}: nobody listens on port {port['port']}"
        elif document["kind"] == "Service":
            yield from check(document, {"matchLabels": spec["selector"]}, "selector")
            for port in spec["ports"]:
                if not any(port["targetPort"] in pod.ports() for pod in known):
                    yield f"{named(document)}: no pod has a port called {port['targetPort']}"
        elif document["kind"] == "PodMonitor":
            yield from check(document, spec["selector"], "selector")
            for endpoint in spec["podMetricsEndpoints"]:
                if not any(endpoint["port"] in pod.ports() for pod in known):
                    yield f"{named(document)}: no pod has a port called {endpoint['port']}"


def references(documents):
    maps = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
    accounts = {document["metadata"]["name"] for document in documents if document["kind"] == "ServiceAccount"}
    for pod in pods(documents):
        named_maps = {volume["configMap"]["name"] for volume in pod.spec.get("volumes", []) if "configMap" in volume}
        named_maps |= {source["configMapRef"]["name"] for source in pod.container().get("envFrom", []) if "configMapRef" in source}
        for name in named_maps - maps:
            yield f"{pod.name}: there is no ConfigMap {name}"
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.name}: there is no ServiceAccount {pod.spec.get('serviceAccountName')}"
    namespaces = {document["metadata"].get("namespace") for document in documents}
    if len(namespaces) != 1:
        yield f"documents of several namespaces: {namespaces}"


def port_of(address):
    return int(str(address).rsplit(":", 1)[1])


def flag(pod, name):
    values = [argument.split("=", 1)[1] for argument in pod.container()["args"] if argument.startswith(f"--{name}=")]
    return values[0] if values else None


def configured(documents, binaries):
    """What the pods are configured with is what the programs take, and goes with the pods' ports, sizes and names."""
    known = {pod.role: pod for pod in pods(documents)}
    maps = {document["metadata"]["name"]: document.get("data", {}) for document in documents if document["kind"] == "ConfigMap"}
    namespace = next((document["metadata"].get("namespace") for document in documents), None)
    if set(known) != {"coordinator", "worker"}:
        yield f"there are pods of {sorted(map(str, known))}, but there have to be a coordinator and workers"
        return
    files = {}
    for role, pod in known.items():
        volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
        folders = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in pod.container()["volumeMounts"]}
        for name in ("config", "job"):
            path = flag(pod, name)
            if path is None:
                continue
            folder, file = path.rsplit("/", 1)
            data = maps.get(folders.get(folder, {}).get("configMap", {}).get("name"), {})
            if file not in data:
                yield f"{role}: --{name}={path} is no file of a ConfigMap"
                continue
            files[role if name == "config" else name] = data[file]
            yield from taken(binaries, role, name, file, data[file])
        settings = tomllib.loads(files.get(role, ""))
        section = settings.get(role, {})
        for key, port in ((section.get("listen"), "grpc"), (settings.get("http", {}).get("listen"), "http")):
            if key is None or port_of(key) != pod.ports().get(port):
                yield f"{role}: listens on {key}, but its port {port} is {pod.ports().get(port)}"
        for key in (settings.get("tls", {}).get("folder"), section.get("scratch")):
            if key is not None and key not in folders:
                yield f"{role}: nothing is mounted at {key}"
        secret = volumes.get("tls", {}).get("secret", {}).get("secretName")
        certificates = [d for d in documents if d["kind"] == "Certificate" and d["spec"]["secretName"] == secret]
        certified = [name for certificate in certificates for name in certificate["spec"].get("dnsNames", [])]
        host = f"{pod.hosts.format(index=0)}.{namespace}.svc"
        if certificates and not any(fnmatch.fnmatch(host, name) for name in certified):
            yield f"{role}: no certificate is for {host}, only {certified}"
        if certificates and f"espalier:role:{role}" not in certificates[0]["spec"].get("uris", []):
            yield f"{role}: its certificate does not name its role"
    coordinator, worker = known["coordinator"], known["worker"]
    url = f"https://{coordinator.hosts.format(index=0)}.$(NAMESPACE).svc:{coordinator.ports().get('grpc')}"
    if flag(worker, "coordinator") != url:
        yield f"worker: calls {flag(worker, 'coordinator')}, but the coordinator is at {url}"
    advertised = f"{worker.hosts.format(index='$(JOB_COMPLETION_INDEX)')}.$(NAMESPACE).svc"
    if flag(worker, "advertise") != advertised:
        yield f"worker: advertises {flag(worker, 'advertise')}, but is {advertised}"
    if "coordinator" in files and "worker" in files:
        wanted = tomllib.loads(files["coordinator"])["coordinator"].get("workers")
        if wanted != worker.job.get("parallelism") or wanted != worker.job.get("completions"):
            yield f"coordinator: waits for {wanted} workers, but {worker.job.get('parallelism')} are started"
        budget = tomllib.loads(files["worker"])["worker"].get("memory_budget")
        memory = worker.container().get("resources", {}).get("limits", {}).get("memory", "0")
        if budget is None or budget >= quantity(memory):
            yield f"worker: keeps {budget} bytes of hidden states in {memory} of memory"


def taken(binaries, role, name, file, text):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / file
        path.write_text(text)
        program = binaries / ("espalier-worker" if role == "worker" or name == "job" else "espalier")
        command = ["check", path] if name == "job" else ["config", "show", "--config", path]
        done = subprocess.run([program, *command], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
        if done.returncode != 0:
            yield f"{role}: {file}: {done.stderr.strip()}"


def measured(documents):
    """Rules look at what the programs measure."""
    sources = "".join(
        path.read_text() for room in ("common", "coordinator", "worker") for path in (REPOSITORY / room).rglob("src/**/*.rs")
    )
    for document in documents:
        for group in document["spec"]["groups"] if document["kind"] == "PrometheusRule" else []:
            for rule in group["rules"]:
                for metric in re.findall(r"\bespalier_\w+", rule["expr"]):
                    stem = re.sub(r"_(bucket|sum|count)$", "", metric)
                    if f'"{metric}"' not in sources and f'"{stem}"' not in sources:
                        yield f"{named(document)}: {rule['alert']}: nothing measures {metric}"


def problems(documents, binaries):
    found = list(schemas(documents))
    if found:
        # The rules take manifests to be what the schemas say.
        return found
    for pod in pods(documents):
        for rule in (hardened, bounded, uses_its_gpu, keeps_secrets_in_files, mounts, fails_well):
            found.extend(f"{pod.name}: {problem}" for problem in rule(pod))
    for rule in (selectors, references, measured):
        found.extend(rule(documents))
    found.extend(configured(documents, binaries))
    return found


# --- planted faults --------------------------------------------------------------------------------------------------------


def faults():
    """What is done to good manifests, and a word of the complaint that must follow."""

    def find(documents, kind, name=None):
        return next(d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"]))

    def job(documents, role):
        return next(pod for pod in pods(documents) if pod.role == role).job

    def container(documents, role):
        return next(pod for pod in pods(documents) if pod.role == role).container()

    def misspelt(documents):
        job(documents, "worker")["backofLimitPerIndex"] = job(documents, "worker").pop("backoffLimitPerIndex")

    def wrong_type(documents):
        container(documents, "worker")["ports"][0]["containerPort"] = "7434"

    def unknown_action(documents):
        find(documents, "JobSet")["spec"]["failurePolicy"]["rules"][1]["action"] = "RestartJobs"

    def misspelt_policy(documents):
        policy = find(documents, "JobSet")["spec"]["failurePolicy"]
        policy["maxRestart"] = policy.pop("maxRestarts")

    def secret_in_a_variable(documents):
        reference = {"secretKeyRef": {"name": "espalier-hub", "key": "token"}}
        container(documents, "coordinator").setdefault("env", []).append({"name": "HF_TOKEN", "valueFrom": reference})

    def root(documents):
        next(iter(pods(documents))).spec["securityContext"]["runAsUser"] = 0

    def writable_root(documents):
        container(documents, "worker")["securityContext"]["readOnlyRootFilesystem"] = False

    def no_limit(documents):
        del container(documents, "worker")["resources"]["limits"]["memory"]

    def idle_gpu(documents):
        container(documents, "worker")["resources"]["limits"]["nvidia.com/gpu"] = "1"

    def selector(documents):
        labels = find(documents, "NetworkPolicy", "espalier-worker")["spec"]["podSelector"]["matchLabels"]
        labels["app.kubernetes.io/component"] = "workers"

    def port(documents):
        find(documents, "NetworkPolicy", "espalier-worker")["spec"]["ingress"][0]["ports"][0]["port"] = 7435

    def other_port(documents):
        data = find(documents, "ConfigMap", "espalier-config")["data"]
        data["coordinator.toml"] = data["coordinator.toml"].replace("0.0.0.0:7433", "0.0.0.0:7443")

    def misspelt_key(documents):
        data = find(documents, "ConfigMap", "espalier-config")["data"]
        data["worker.toml"] = data["worker.toml"].replace("memory_budget", "memory_budged")

    def wrong_job(documents):
        data = find(documents, "ConfigMap", "espalier-job")["data"]
        data["job.toml"] += "\n[pattern]\nsparsity = 1.5\n"

    def no_volume(documents):
        next(pod for pod in pods(documents) if pod.role == "worker").spec["volumes"].pop()

    def wrong_exit_code(documents):
        job(documents, "coordinator")["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = [65, 70, 75]

    def wrong_host(documents):
        arguments = container(documents, "worker")["args"]
        container(documents, "worker")["args"] = [a.replace("-coordinator-0", "-coordinator-1") for a in arguments]

    def too_few(documents):
        job(documents, "worker")["parallelism"] = job(documents, "worker")["completions"] = 2

    def certificate(documents):
        names = find(documents, "Certificate", "espalier-worker")["spec"]
        names["dnsNames"] = ["*.espalier.default.svc"]

    return [
        (misspelt, "backofLimitPerIndex"),
        (wrong_type, "is not of type 'integer'"),
        (unknown_action, "RestartJobs"),
        (misspelt_policy, "maxRestart"),
        (secret_in_a_variable, "secret in the variable HF_TOKEN"),
        (root, "not root"),
        (writable_root, "can write its root"),
        (no_limit, "no limit of memory"),
        (idle_gpu, "computes on the CPU with GPUs"),
        (selector, "selects no pod"),
        (port, "nobody listens on port 7435"),
        (other_port, "listens on 0.0.0.0:7443"),
        (misspelt_key, "memory_budget"),
        (wrong_job, "1.5"),
        (no_volume, "which is no volume"),
        (wrong_exit_code, "fail at once"),
        (wrong_host, "but the coordinator is at"),
        (too_few, "2 are started"),
        (certificate, "no certificate is for"),
    ]


def planted(good, binaries):
    for fault, word in faults():
        damaged = copy.deepcopy(good)
        fault(damaged)
        assert damaged != good, f"{fault.__name__} changed nothing"
        found = problems(damaged, binaries)
        if not any(word in problem for problem in found):
            yield f"planted fault {fault.__name__} was not found: {found or 'nothing was'}"


# --- everything ------------------------------------------------------------------------------------------------------------


def run(*command):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout


def sets(binaries):
    """Every set of manifests: its name, its documents."""
    if shutil.which("kubectl") is None:
        print("SKIPPED: kubectl is not here, so deploy/k8s was not put together; what the program renders is checked", file=sys.stderr)
    else:
        for folder in sorted((K8S / "overlays").iterdir()):
            yield f"deploy/k8s/overlays/{folder.name}", documents(run("kubectl", "kustomize", folder))
    sizes = ["--workers", 3, "--worker-memory", "32GiB", "--worker-cpus", 8]
    for more in (
        ["--monitoring", "--cert-manager"],
        ["--as", "jobs"],
        ["--gpu", "--cert-manager"],
        ["--name", "seven", "--namespace", "research", "--queue", "night", "--monitoring", "--cert-manager"],
        ["--claim", "models", "--as", "jobs", "--name", "other", "--cert-manager"],
    ):
        job = K8S / ("base" if "--claim" in more else "components/s3") / "job.toml"
        command = [binaries / "espalier", "render", "k8s", job, *sizes, *more]
        yield " ".join(["espalier render k8s", *more]), documents(run(*command))


def main():
    binaries = pathlib.Path(sys.argv[1]).resolve()
    failed, good = [], None
    for name, found in sets(binaries):
        complaints = problems(found, binaries)
        print(f"{name}: {len(found)} documents, {len(complaints)} problems")
        failed += [f"{name}: {complaint}" for complaint in complaints]
        kinds = {document["kind"] for document in found}
        if not complaints and {"JobSet", "Certificate"} <= kinds and good is None:
            good = found
    if good is None:
        failed.append("no set of manifests with a JobSet and certificates passed, so that no fault could be planted")
    else:
        missed = list(planted(good, binaries))
        print(f"planted faults: {len(faults())}, {len(missed)} not found")
        failed += missed
    for failure in failed:
        print(failure, file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
