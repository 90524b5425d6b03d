#!/usr/bin/env bash
# Builds the images on bases made here and runs deploy/compose.yaml on them: one worker is killed, another is cut off from the
# network for a while, and the job ends with the bytes of one machine.
# Usage: test.sh TARGET CARGO, after `make build`.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$1
cargo=$2
# shellcheck source=deploy/docker/compose.sh
. deploy/docker/compose.sh
# shellcheck source=deploy/docker/engine.sh
. deploy/docker/engine.sh
# shellcheck source=deploy/docker/bases.sh
. deploy/docker/bases.sh
# Apart from a cluster and from images that somebody uses.
export ESPALIER_PROJECT=espalier-test ESPALIER_TAG=test ESPALIER_TLS=$bases/tls
trap 'compose down --volumes --remove-orphans >/dev/null 2>&1 || true; end_engine' EXIT

fail() {
    echo "test-compose: $1" >&2
    compose logs --no-color --tail 30 coordinator worker-1 worker-2 worker-3 >&2 || true
    exit 1
}
# Waits until so many layers were pruned, or the coordinator has ended.
pruned() {
    while [ "$(docker logs "$coordinator" 2>&1 | grep -c ' pruned by ')" -lt "$1" ]; do
        [ "$(docker inspect --format '{{.State.Running}}' "$coordinator")" = true ] || fail "the job ended before layer $1 was pruned"
        sleep 0.2
    done
    [ "$(docker inspect --format '{{.State.Running}}' "$coordinator")" = true ] || fail "the job ended before anything could be disturbed"
}

certify
compose build
compose down --volumes --remove-orphans >/dev/null 2>&1 || true
compose up --detach
coordinator=$(container coordinator)
# So slow that there is something to disturb.
for worker in worker-1 worker-2 worker-3; do
    docker update --cpus 0.1 "$(container $worker)" >/dev/null
done
pruned 1
docker kill "$(container worker-1)" >/dev/null
echo "test-compose: worker-1 is killed"
pruned 2
network=$(docker inspect --format '{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}' "$coordinator")
docker network disconnect "$network" "$(container worker-2)"
echo "test-compose: worker-2 is cut off"
pruned 3
docker network connect --alias worker-2 "$network" "$(container worker-2)"
echo "test-compose: worker-2 is back"
code=$(docker wait "$coordinator")
[ "$code" = 0 ] || fail "the coordinator ended with $code"
code=$(docker wait "$(container worker-3)")
[ "$code" = 0 ] || fail "worker-3, whom nobody disturbed, ended with $code"
# Whoever owned the layer or had a share of it says so.
{ docker logs "$coordinator"; docker logs "$(container worker-2)"; docker logs "$(container worker-3)"; } >"$target/docker/said.log" 2>&1
for worker in worker-1 worker-2; do
    grep -qE "\($worker\) is lost|going on without an assistant.*$worker:" "$target/docker/said.log" || fail "nobody missed $worker"
done

rm -rf "$target"/docker/{there,here,here.run}
mkdir -p "$target/docker/there"
docker run --rm --interactive --network "$network" --env AWS_ACCESS_KEY_ID=local --env AWS_SECRET_ACCESS_KEY=local-only \
    --entrypoint python "$STORE_IMAGE" - >"$target/docker/there.tar" <<'PYTHON'
import io, sys, tarfile
import boto3

client = boto3.client("s3", endpoint_url="http://store:5000", region_name="us-east-1")
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for item in client.list_objects_v2(Bucket="espalier", Prefix="pruned/")["Contents"]:
        body = client.get_object(Bucket="espalier", Key=item["Key"])["Body"].read()
        info = tarfile.TarInfo(item["Key"].removeprefix("pruned/"))
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))
PYTHON
tar --extract --file "$target/docker/there.tar" --directory "$target/docker/there"
# By the name that the model is mounted under, which is among what is written.
ln -sfn "$PWD/tests/golden/tiny/llama-tiny" "$target/docker/model"
"$target/release/espalier" prune "$target/docker/model" --job deploy/docker/job.toml \
    --calibration tests/golden/text/wikitext2-valid-head.txt --output "$target/docker/here"
diff --recursive --brief "$target/docker/here" "$target/docker/there" || fail "what the bucket has is not what one machine makes"
(cd "$target/docker/there" && sha256sum ./*)
echo "test-compose: passed"
