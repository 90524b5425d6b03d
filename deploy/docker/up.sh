#!/usr/bin/env bash
# Makes the certificates of deploy/compose.yaml if they are not there, starts its cluster, and shows what the coordinator says until the job
# is done. The cluster stands, with the result in its bucket, until standard input ends. Exits with the job's code.
set -euo pipefail
cd "$(dirname "$0")/../.."
# shellcheck source=deploy/docker/compose.sh
. deploy/docker/compose.sh

certify
trap 'compose down --volumes' EXIT
compose up --build --detach
coordinator=$(container coordinator)
docker logs --follow "$coordinator"
code=$(docker wait "$coordinator")
printf '\nThe coordinator ended with %s. Ctrl-D or Enter ends the rest, and the bucket with it.\n' "$code"
read -r || true
exit "$code"
