#!/usr/bin/env bash
# Makes the certificates of deploy/compose.yaml if they are not there, starts its cluster, and shows what the coordinator says until the job
# is done. The cluster stands, with the result in its bucket, until standard input ends. Exits with the job's code.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=deploy/docker/compose.sh
. deploy/docker/compose.sh

missing=$(lacking)
[ -z "$missing" ] || { echo "up.sh: $missing" >&2; exit 1; }
docker info >/dev/null 2>&1 || { echo "up.sh: no Docker engine answers" >&2; exit 1; }
certify
trap 'compose down --volumes || true' EXIT
compose up --build --detach
coordinator=$(container coordinator)
docker logs --follow "$coordinator"
code=$(docker wait "$coordinator")
printf '\nThe coordinator ended with %s. Ctrl-D or Enter ends the rest, and the bucket with it.\n' "$code"
read -r || true
exit "$code"
