# shellcheck shell=bash
# Sourced in the repository's root by what starts deploy/compose.yaml.

# Docker Compose, as a plugin or as a program of its own.
compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose --project-name espalier --file deploy/compose.yaml "$@"
    elif command -v docker-compose >/dev/null; then
        COMPOSE_DOCKER_CLI_BUILD=1 DOCKER_BUILDKIT=1 docker-compose --project-name espalier --file deploy/compose.yaml "$@"
    else
        echo "${0##*/}: there is no Docker Compose: get its plugin, or Debian's docker-compose" >&2
        return 1
    fi
}

# The container of a service, whatever this Compose joins names with.
container() {
    docker ps --all --quiet --filter label=com.docker.compose.project=espalier --filter "label=com.docker.compose.service=$1"
}

# Certificates for all, which whoever runs in the containers can read: root gives them to the images' user, and anybody else runs the
# containers as himself.
certify() {
    local tls=deploy/docker/tls name role
    for name in coordinator worker-1 worker-2 worker-3; do
        role=${name%-*}
        test -f "$tls/$name/tls.crt" || deploy/certificates.sh "$tls" "$name" "$role" "DNS:$name"
    done
    if [ "$(id -u)" = 0 ]; then
        chown -R 65532:65532 "$tls"
    else
        ESPALIER_USER=$(id -u):$(id -g)
        export ESPALIER_USER
    fi
}
