# shellcheck shell=bash
# Bases for the images, from Debian's packages alone: for machines that reach no image registry. Sourced in the repository's root with
# the build folder in $target and cargo in $cargo; makes what is not there yet, and tells compose.yaml to build on it. What a base is
# made of is in its tag.
: "${target:?the build folder}" "${cargo:?cargo}"
bases=$(mkdir -p "$target/docker" && cd "$target/docker" && pwd)
suite=bookworm

# The mirror this machine has its packages from, if it is one of Debian's.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -nE 's/^URIs: *//p; s/^deb (\[[^]]*\] )?([^ ]+) .*/\2/p' | tr ' ' '\n' | grep -E '^https?://.*/debian/?$' | sed -n 1p || true)

# Unpacks Debian with some packages into an image, unless that is there.
debian() {
    local name=$1 packages=$2
    docker image inspect "$name" >/dev/null 2>&1 && return
    rm -rf --one-file-system "$bases/root"
    debootstrap --variant=minbase --include="$packages" "$suite" "$bases/root" "${mirror:-http://deb.debian.org/debian}" >"$bases/debootstrap.log" ||
        { tail -n 20 "$bases/debootstrap.log" >&2; return 1; }
    tar --directory "$bases/root" --exclude=./var/cache/apt --exclude=./dev --create . | docker import - espalier-base/partial >/dev/null
    docker tag espalier-base/partial "$name"
    docker rmi espalier-base/partial >/dev/null
    rm -rf --one-file-system "$bases/root"
}

# Where programs run: the C library and certificates, and Python, for the store.
RUNTIME_IMAGE=espalier-base/runtime:$suite
debian "$RUNTIME_IMAGE" ca-certificates,libgcc-s1,python3

# Where they are built: a C compiler, this machine's Rust, and the sources of all dependencies, so that nothing is fetched.
BUILD_IMAGE=espalier-base/build:$({ cat Cargo.lock; rustc -vV; } | sha256sum | cut -c1-12)
if ! docker image inspect "$BUILD_IMAGE" >/dev/null 2>&1; then
    rust=$(rustc --print sysroot)
    [ "$rust" != /usr ] || { echo "bases.sh: a Rust of its own folder is needed, as rustup has it" >&2; exit 1; }
    debian espalier-base/compiler:$suite ca-certificates,gcc,g++,libc6-dev
    rm -rf "$bases/build" && mkdir -p "$bases/build/rust"
    cp -a "$rust/bin" "$rust/lib" "$bases/build/rust"
    "$cargo" vendor --quiet --locked "$bases/build/vendor" >/dev/null
    cat >"$bases/build/config.toml" <<'TOML'
[source.crates-io]
replace-with = "vendored"

[source.vendored]
directory = "/usr/local/vendor"
TOML
    docker build --quiet --tag "$BUILD_IMAGE" --file - "$bases/build" >/dev/null <<'DOCKERFILE'
FROM espalier-base/compiler:bookworm
COPY rust /usr/local/rust
COPY vendor /usr/local/vendor
COPY config.toml /usr/local/cargo/config.toml
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
DOCKERFILE
    rm -rf "$bases/build"
fi

# The S3 server, as its own image has it.
STORE_IMAGE=espalier-base/store:moto-5.2.5
if ! docker image inspect "$STORE_IMAGE" >/dev/null 2>&1; then
    rm -rf "$bases/store" && mkdir -p "$bases/store"
    python3 -m pip install --quiet --root-user-action=ignore --python-version 3.11 --only-binary=:all: \
        --target "$bases/store/site" 'moto[server]==5.2.5'
    docker build --quiet --tag "$STORE_IMAGE" --file - "$bases/store" >/dev/null <<'DOCKERFILE'
FROM espalier-base/runtime:bookworm
COPY site /usr/local/site
RUN ln -s python3 /usr/bin/python
ENV PYTHONPATH=/usr/local/site
ENTRYPOINT ["python", "-m", "moto.server", "-H", "0.0.0.0"]
DOCKERFILE
    rm -rf "$bases/store"
fi

export BUILD_IMAGE RUNTIME_IMAGE STORE_IMAGE
