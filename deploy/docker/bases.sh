# shellcheck shell=bash
# Bases for the images, from Debian's packages alone: for machines that reach no image registry. Sourced in the repository's root with
# the build folder in $target and cargo in $cargo; makes what is not there yet, and tells compose.yaml to build on it.
: "${target:?the build folder}" "${cargo:?cargo}"
bases=$(mkdir -p "$target/docker" && cd "$target/docker" && pwd)
suite=bookworm

# The mirror this machine has its packages from.
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources 2>/dev/null |
    sed -nE 's/^URIs: *//p; s/^deb (\[[^]]*\] )?([^ ]+) .*/\2/p' | sed -n 1p || true)

# Unpacks Debian with some packages into an image, unless that is there.
debian() {
    local name=$1 packages=$2
    docker image inspect "$name" >/dev/null 2>&1 && return
    rm -rf "$bases/root"
    debootstrap --variant=minbase --include="$packages" "$suite" "$bases/root" "${mirror:-http://deb.debian.org/debian}" >"$bases/debootstrap.log" ||
        { tail -n 20 "$bases/debootstrap.log" >&2; return 1; }
    tar --directory "$bases/root" --exclude=./var/cache/apt --exclude=./dev --create . | docker import - "$name" >/dev/null
    rm -rf "$bases/root"
}

# Where programs run: the C library and certificates, and Python, for the store.
debian espalier-base/runtime ca-certificates,libgcc-s1,python3

# Where they are built: a C compiler, this machine's Rust, and the sources of all dependencies, so that nothing is fetched.
if ! docker image inspect espalier-base/build >/dev/null 2>&1; then
    debian espalier-base/compiler ca-certificates,gcc,g++,libc6-dev
    rm -rf "$bases/build" && mkdir -p "$bases/build/rust"
    rust=$(rustc --print sysroot)
    cp -a "$rust/bin" "$rust/lib" "$bases/build/rust"
    "$cargo" vendor --quiet --locked "$bases/build/vendor" >/dev/null
    cat >"$bases/build/config.toml" <<'TOML'
[source.crates-io]
replace-with = "vendored"

[source.vendored]
directory = "/usr/local/vendor"
TOML
    docker build --quiet --tag espalier-base/build --file - "$bases/build" >/dev/null <<'DOCKERFILE'
FROM espalier-base/compiler
COPY rust /usr/local/rust
COPY vendor /usr/local/vendor
COPY config.toml /usr/local/cargo/config.toml
ENV CARGO_HOME=/usr/local/cargo PATH=/usr/local/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
DOCKERFILE
    rm -rf "$bases/build"
fi

# The S3 server, as its own image has it.
if ! docker image inspect espalier-base/store >/dev/null 2>&1; then
    rm -rf "$bases/store" && mkdir -p "$bases/store"
    python3 -m pip install --quiet --root-user-action=ignore --python-version 3.11 --only-binary=:all: \
        --target "$bases/store/site" 'moto[server]==5.2.5'
    docker build --quiet --tag espalier-base/store --file - "$bases/store" >/dev/null <<'DOCKERFILE'
FROM espalier-base/runtime
COPY site /usr/local/site
RUN ln -s python3 /usr/bin/python
ENV PYTHONPATH=/usr/local/site
ENTRYPOINT ["python", "-m", "moto.server", "-H", "0.0.0.0"]
DOCKERFILE
    rm -rf "$bases/store"
fi

export BUILD_IMAGE=espalier-base/build RUNTIME_IMAGE=espalier-base/runtime STORE_IMAGE=espalier-base/store
