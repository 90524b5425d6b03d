# shellcheck shell=bash
# A Docker engine to test with: the one that runs, or one of our own, which `end_engine` ends. Sourced after compose.sh, with the build
# folder in $target; where nothing can be tested the shell ends here, says why, and has not failed.
: "${target:?the build folder}"

skip() {
    echo "test-compose: SKIPPED: $1, so images and compose.yaml were not tried (Debian has docker.io, docker-compose and debootstrap)" >&2
    exit 0
}
dockerd=
end_engine() {
    if [ -n "$dockerd" ]; then
        kill "$dockerd" 2>/dev/null || true
        wait "$dockerd" || true
        rm -rf "$engine" || true
    fi
}

missing=$(lacking)
[ -z "$missing" ] || skip "$missing"
for program in debootstrap openssl python3; do
    command -v "$program" >/dev/null || skip "there is no $program"
done
[ "$(id -u)" = 0 ] || skip "bases can be made by root only"
if ! docker info >/dev/null 2>&1; then
    command -v dockerd >/dev/null || skip "no Docker engine runs, and there is none to start"
    mkdir -p "$target/docker"
    engine=$(mktemp -d)
    dockerd --data-root "$(cd "$target/docker" && pwd)/engine" --exec-root "$engine/exec" --pidfile "$engine/pid" \
        --host "unix://$engine/socket" >"$target/docker/engine.log" 2>&1 &
    dockerd=$!
    export DOCKER_HOST=unix://$engine/socket
    trap end_engine EXIT
    for ((tries = 0; tries < 60; tries++)); do
        ! docker info >/dev/null 2>&1 || break
        kill -0 "$dockerd" 2>/dev/null || skip "the Docker engine does not start: $(tail -n 1 "$target/docker/engine.log")"
        sleep 1
    done
    docker info >/dev/null 2>&1 || skip "the Docker engine does not answer within a minute"
fi
