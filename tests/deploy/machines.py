"""Checks what is deployed without Kubernetes, as far as the tools are here: scripts, images, compose, units, rules.

    machines.py BINARIES

Tools that come from PyPI are beside this Python; others are used if they are installed, and it is said aloud if they are not.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
# systemd's measure of what a service could do to its machine: 0 nothing, 10 everything.
MOST_EXPOSURE = 2.0


def done(*command):
    finished = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return finished.returncode == 0, (finished.stdout + finished.stderr).strip()


def tool(name):
    beside = pathlib.Path(sys.executable).parent / name
    found = beside if beside.exists() else shutil.which(name)
    if found is None:
        print(f"SKIPPED: {name} is not here", file=sys.stderr)
    return found


def scripts():
    program = tool("shellcheck")
    is_script = lambda file: file.is_file() and re.match(rb"#!.*sh\n", file.read_bytes()[:64])
    for script in [*filter(is_script, sorted(DEPLOY.rglob("*"))), REPOSITORY / ".ci/run"] if program else []:
        # With what a script sources, whose place is told from the root.
        fine, said = done(program, "-x", "-a", f"--source-path={REPOSITORY}", script)
        yield f"shellcheck {script.relative_to(REPOSITORY)}", None if fine else said


def images():
    program = tool("hadolint")
    for file in sorted(DEPLOY.glob("docker/*.Dockerfile")):
        if program:
            fine, said = done(program, file)
            yield f"hadolint {file.name}", None if fine else said
        text = file.read_text()
        missing = [word for word in ("USER 65532:65532", "STOPSIGNAL SIGTERM", "ENTRYPOINT [", "org.opencontainers.image.revision") if word not in text]
        if not pathlib.Path(f"{file}.dockerignore").exists():
            missing.append("a .dockerignore")
        yield f"rules of {file.name}", f"lacks {missing}" if missing else None


def compose(binaries):
    file = DEPLOY / "compose.yaml"
    services = yaml.safe_load(file.read_text())["services"]
    wrong = []
    for name, service in services.items():
        wrong += [f"{name} waits for {other}, which is no service" for other in service.get("depends_on", {}) if other not in services]
        build = service.get("build")
        if build and not (file.parent / build["context"] / build["dockerfile"]).exists():
            wrong.append(f"{name} is built from {build['dockerfile']}, which is not there")
        if build and not (service.get("read_only") and service.get("cap_drop") == ["ALL"] and service.get("user") == "${ESPALIER_USER:-65532:65532}"):
            wrong.append(f"{name} is not hardened")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            # Certificates are made before it is started.
            if not source.startswith("${ESPALIER_TLS") and not (file.parent / source).exists():
                wrong.append(f"{name} mounts {source}, which is not there")
    yield "deploy/compose.yaml", "; ".join(wrong) or None
    fine, said = done(binaries / "espalier-worker", "check", DEPLOY / "docker/job.toml")
    yield "deploy/docker/job.toml", None if fine else said


def units(binaries):
    program = tool("systemd-analyze")
    if not program:
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(DEPLOY.glob("systemd/*.service")):
            unit = pathlib.Path(folder) / file.name
            # It wants the program to be where it will be.
            unit.write_text(file.read_text().replace("ExecStart=/usr/local/bin/", f"ExecStart={binaries}/"))
            fine, said = done(program, "verify", "--man=no", unit)
            yield f"systemd-analyze verify {file.name}", said if said or not fine else None
            fine, said = done(program, "security", "--offline=true", f"--threshold={int(MOST_EXPOSURE * 10)}", unit)
            yield f"systemd-analyze security {file.name}", None if fine else said.splitlines()[-1]


def rules():
    program = tool("promtool")
    if not program:
        return
    document = yaml.safe_load((DEPLOY / "k8s/components/monitoring/rules.yaml").read_text())
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(document["spec"], file)
        file.flush()
        fine, said = done(program, "check", "rules", file.name)
        yield "promtool check rules", None if fine else said


def main():
    binaries = pathlib.Path(sys.argv[1]).resolve()
    failed = False
    for checks in (scripts(), images(), compose(binaries), units(binaries), rules()):
        for what, problem in checks:
            print(f"{what}: {'fine' if problem is None else problem}")
            failed |= problem is not None
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
