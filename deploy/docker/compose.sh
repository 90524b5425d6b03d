# shellcheck shell=bash
# Sourced in the repository's root by what starts deploy/compose.yaml. ESPALIER_PROJECT, ESPALIER_TAG and ESPALIER_TLS keep several of
# its clusters apart.
export DOCKER_BUILDKIT=1 COMPOSE_DOCKER_CLI_BUILD=1

# A client that has BuildKit: with a plugin for it, or Debian's, which needs none and may lie behind another.
has_buildkit() {
    docker buildx version >/dev/null 2>&1 || docker --version 2>/dev/null | grep -q ' version 20\.'
}
if ! has_buildkit && [ -x /usr/bin/docker ]; then
    shims=$(mktemp -d)
    ln -s /usr/bin/docker "$shims/docker"
    PATH=$shims:$PATH
fi

# Says what is missing to start the cluster, if anything is.
lacking() {
    if ! command -v docker >/dev/null; then
        echo "there is no Docker"
    elif ! has_buildkit; then
        echo "this Docker client cannot use BuildKit: get its plugin buildx"
    elif ! docker compose version >/dev/null 2>&1 && ! command -v docker-compose >/dev/null; then
        echo "there is no Docker Compose: get its plugin, or Debian's docker-compose"
    fi
}

# Docker Compose, as a plugin or as a program of its own.
compose() {
    local one=(docker compose)
    docker compose version >/dev/null 2>&1 || one=(docker-compose)
    "${one[@]}" --project-name "${ESPALIER_PROJECT:-espalier}" --file deploy/compose.yaml "$@"
}

# The container of a service, whatever this Compose joins names with.
container() {
    docker ps --all --quiet --filter "label=com.docker.compose.project=${ESPALIER_PROJECT:-espalier}" \
        --filter "label=com.docker.compose.service=$1"
}

# Certificates for all that last another day, which whoever runs in the containers can read: root gives them to the images' user, and
# anybody else runs the containers as himself.
certify() {
    local tls=${ESPALIER_TLS:-deploy/docker/tls} name
    if [ -e "$tls" ] && ! { [ -r "$tls" ] && [ -w "$tls" ]; }; then
        echo "${0##*/}: $tls is somebody else's: remove it, or name another folder in ESPALIER_TLS" >&2
        return 1
    fi
    for name in coordinator worker-1 worker-2 worker-3; do
        if ! [ -f "$tls/$name/ca.crt" ] || ! openssl x509 -checkend 86400 -noout -in "$tls/$name/tls.crt" >/dev/null 2>&1; then
            deploy/certificates.sh "$tls" "$name" "${name%-*}" "DNS:$name"
        fi
        [ "$(id -u)" != 0 ] || chown -R 65532:65532 "$tls/$name"
    done
    if [ "$(id -u)" = 0 ]; then
        chmod 755 "$tls"
    else
        ESPALIER_USER=$(id -u):$(id -g)
        export ESPALIER_USER
    fi
}
