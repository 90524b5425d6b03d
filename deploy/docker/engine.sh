# shellcheck shell=bash
# A Docker engine to test with: the one that runs, or one of our own, which ends with the shell that sources this. Needs $target; without
# an engine the shell ends here, says why, and has not failed.
: "${target:?the build folder}"
export DOCKER_BUILDKIT=1
# A client that has BuildKit: with a plugin for it, or Debian's, which needs none.
has_buildkit() {
    docker buildx version >/dev/null 2>&1 || docker --version 2>/dev/null | grep -q ' version 20\.'
}
has_buildkit || PATH=/usr/bin:$PATH

skip() {
    echo "test-compose: SKIPPED: $1, so images and compose.yaml were not tried (Debian has docker.io, docker-compose and debootstrap)" >&2
    exit 0
}
command -v docker >/dev/null || skip "there is no Docker"
command -v debootstrap >/dev/null || skip "there is no debootstrap"
[ "$(id -u)" = 0 ] || skip "bases can be made by root only"
if ! docker info >/dev/null 2>&1; then
    command -v dockerd >/dev/null || skip "no Docker engine runs, and there is none to start"
    mkdir -p "$target/docker"
    engine=$(mktemp -d)
    dockerd --data-root "$(cd "$target/docker" && pwd)/engine" --exec-root "$engine/exec" --pidfile "$engine/pid" \
        --host "unix://$engine/socket" >"$target/docker/engine.log" 2>&1 &
    dockerd=$!
    export DOCKER_HOST=unix://$engine/socket
    trap 'kill $dockerd; wait $dockerd || true; rm -rf "$engine"' EXIT
    for ((tries = 0; tries < 60; tries++)); do
        ! docker info >/dev/null 2>&1 || break
        kill -0 $dockerd 2>/dev/null || skip "the Docker engine does not start: $(tail -n 1 "$target/docker/engine.log")"
        sleep 1
    done
fi
