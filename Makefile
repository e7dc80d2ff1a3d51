# Two commands for a fresh machine: `make demo` and `make test`.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= python3

# Where it is set, each of the hundreds of processes of the tests would compile torch and Ray anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo cluster-demo test test-all chaos bench lint lock clean

install: $(STAMP)

# uv where it is on PATH, else uv installed into the venv. The lock carries versions and hashes.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("prunesweep needs Python 3.11 or newer, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@set -e; uv="$$(command -v uv || true)"; \
	if [ -z "$$uv" ]; then $(BIN)/python -m pip install --quiet uv; uv="$(BIN)/uv"; fi; \
	echo "installing the pinned dependencies (about 6 GB, torch with its GPU libraries)"; \
	"$$uv" pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock; \
	"$$uv" pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: install
	@$(BIN)/prunesweep run digits --store results
	@$(BIN)/prunesweep plot digits --store results -o results/digits.png

# Three nodes on this machine, one submitted sweep, one node killed in mid-run, the table at the end.
cluster-demo: install
	@RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m tests.faults.cluster_demo

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright --level error
	@$(BIN)/lint-imports --no-logo

test: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: lint
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Random faults against small sweeps for so many minutes; says what it did and what held.
MINUTES ?= 10
chaos: install
	@RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m tests.faults.chaos $(MINUTES)

# What it costs, side by side: one table, and bench.json. `make bench NAMES="corr query"` runs some.
NAMES ?=
bench: install
	@RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0 $(BIN)/python -m tests.benchmarks $(NAMES)

# Renew the locks from pyproject.toml; no index address gets in. The image's is a part of the other.
COMPILE := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --quiet
lock:
	$(COMPILE) --group dev --extra aws pyproject.toml -o requirements.lock
	$(COMPILE) --extra mllm --extra aws --constraints requirements.lock --no-annotate pyproject.toml -o deploy/requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache
