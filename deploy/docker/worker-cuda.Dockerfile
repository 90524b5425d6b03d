# Espalier's worker for NVIDIA GPUs. From the root of the repository:
#
#   docker buildx build -f deploy/docker/worker-cuda.Dockerfile --sbom=true --provenance=true \
#       --build-arg REVISION=$(git rev-parse HEAD) -t espalier-worker:0.1.0-cuda .
#
# For builds that can be repeated, give both bases with their digests: --build-arg RUNTIME_IMAGE=NAME:TAG@sha256:…
#
# The driver comes from the machine (the NVIDIA container runtime mounts libcuda.so.1); without one this program does not start,
# and espalier-worker's other image is the right one. CUDA_COMPUTE_CAP is the oldest GPU it is for: 80 is A100, 90 is H100.
ARG BUILD_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG RUNTIME_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BUILD_IMAGE} AS build
ARG RUST_VERSION=1.95.0
ARG CUDA_COMPUTE_CAP=80
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends build-essential ca-certificates curl rustup \
    && rm -rf /var/lib/apt/lists/* \
    && rustup toolchain install --profile minimal "${RUST_VERSION}"
WORKDIR /source
COPY . .
# What was compiled stays in the cache; only the program is taken out of it.
RUN --mount=type=cache,target=/root/.cargo/registry,sharing=locked \
    --mount=type=cache,target=/source/target,sharing=locked,id=espalier-worker-cuda \
    CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP}" cargo build --release --locked -p espalier-worker --bin espalier-worker --features cuda,nccl \
    && install -D --strip --mode=0755 target/release/espalier-worker /out/usr/local/bin/espalier-worker \
    && install -D --mode=0644 LICENSE /out/usr/share/doc/espalier/LICENSE

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="espalier-worker" \
    org.opencontainers.image.description="Espalier's worker for NVIDIA GPUs" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="https://github.com/espalier/espalier" \
    org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/ /
# By number, so that runAsNonRoot can be checked. Nothing is written but below /tmp and what is mounted.
USER 65532:65532
WORKDIR /
EXPOSE 7434 9434
STOPSIGNAL SIGTERM
ENTRYPOINT ["/usr/local/bin/espalier-worker"]
CMD ["serve"]
