# `make demo` and `make test` need Python 3.11 or later and make, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq

.PHONY: demo test test-fast test-runner-v2 contract soak soak-aarch64 check format \
  bench-planner bench-ipc bench-loader bench-source-routing bench-device clean

demo: $(READY)
	$(BIN)/eplb demo

test: $(READY)
	@scripts/chromium.sh
	$(BIN)/python -m pytest

# everything but the tests that start a real vLLM
test-fast: $(READY)
	$(BIN)/python -m pytest -m "not vllm"

# vLLM's model runner V2 on the CPU, by Triton's interpreter (700 MB in build/triton)
test-runner-v2: $(READY)
	@test -d build/triton || $(PIP) install --no-deps --target build/triton triton==3.5.1
	$(BIN)/python -m pytest tests/vllm/runner_v2.py

# record anew what we touch of vLLM, from the wheels of the versions that we support
contract: $(READY)
	$(BIN)/python scripts/contract.py $(ARGS)

# the long form of the tests of shared memory and of the loaders: some hours
soak: $(READY)
	$(BIN)/python -m pytest -m soak --soak -o timeout=0 $(ARGS)

# the stress of the heat ring as aarch64 code, emulated (Debian only; 500 MB in build/aarch64)
soak-aarch64: $(READY)
	scripts/aarch64.sh $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@mkdir -p build/types && ln -sfn ../.. build/types/flash_eplb
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# ARGS=--quick for a first look; ARGS=--help lists the rest
bench-planner: $(BENCH_READY)
	$(BIN)/python -m benchmarks.planner $(ARGS)

bench-ipc: $(BENCH_READY)
	$(BIN)/python -m benchmarks.ipc $(ARGS)

bench-loader: $(BENCH_READY)
	$(BIN)/python -m benchmarks.loader $(ARGS)

bench-source-routing: $(READY)
	$(BIN)/python -m benchmarks.source_routing

# needs a CUDA device
bench-device: $(READY)
	$(BIN)/python -m benchmarks.device $(ARGS)

$(READY): requirements-dev.txt pyproject.toml scripts/vllm-dist/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than 3.11; set PYTHON=python3.11 or later"; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -e . -c requirements-dev.txt
	@echo "compiling the planner's kernels while the rest is installed"
	@$(BIN)/eplb warmup & warmup=$$!; \
	  $(PIP) install --no-deps -r requirements-dev.txt && \
	  $(PIP) install --no-deps --no-build-isolation ./scripts/vllm-dist || { kill $$warmup; exit 1; }; \
	  wait $$warmup
	@touch $(READY)

$(BENCH_READY): requirements-bench.txt $(READY)
	@$(PIP) install --no-deps -r requirements-bench.txt
	@touch $@

clean:
	-test ! -x $(BIN)/eplb || $(BIN)/eplb clean
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info \
	  scripts/vllm-dist/build scripts/vllm-dist/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
