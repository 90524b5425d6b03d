# Espalier's worker for CPUs. From the root of the repository:
#
#   docker buildx build -f deploy/docker/worker.Dockerfile --sbom=true --provenance=true \
#       --build-arg REVISION=$(git rev-parse HEAD) -t espalier-worker:0.1.0 .
#
# For builds that can be repeated, give both bases with their digests: --build-arg RUNTIME_IMAGE=NAME:TAG@sha256:…
ARG BUILD_IMAGE=rust:1.95-bookworm
# The C library and certificates, and nothing that could be run.
ARG RUNTIME_IMAGE=gcr.io/distroless/cc-debian12:nonroot

FROM ${BUILD_IMAGE} AS build
WORKDIR /source
COPY . .
# What was compiled stays in the cache; only the program is taken out of it.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/source/target,sharing=locked,id=espalier-worker \
    cargo build --release --locked -p espalier-worker --bin espalier-worker \
    && install -D --strip --mode=0755 target/release/espalier-worker /out/usr/local/bin/espalier-worker \
    && install -D --mode=0644 LICENSE /out/usr/share/doc/espalier/LICENSE

FROM ${RUNTIME_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="espalier-worker" \
    org.opencontainers.image.description="Espalier's worker for CPUs" \
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
