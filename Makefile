# What a person and CI run alike. Needs Python 3.11 or newer with venv, and nothing else.
#
#   make demo    a whole service on this machine: three answers side by side, and where their time went
#   make serve   the same service, kept up
#   make test    format, lint, types, import directions and every test, in some minutes
#   make check   the same without the tests
#   make test-nightly   the long tests too
#   make bench-first-token, bench-disconnect   the benchmarks of docs/performance.md
#   make clean   removes what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Done again only when a pin or a dependency changes.
INSTALLED := $(VENV)/.installed
PACKAGES := kernels engine kvtransfer prefill_worker decode_worker cluster bench tests
TORCH := torch==2.13.0
SERVE_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
# Several processes share the cores: a thread that waits must not spin on one that another could use.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo serve test test-nightly bench-first-token bench-disconnect check model clean install

demo: $(INSTALLED)
	@$(BIN)/tandem demo

serve: $(INSTALLED)
	@$(BIN)/tandem serve $(SERVE_FLAGS)

test: check model
	$(BIN)/python -m pytest -m "not nightly and not gpu" $(PYTEST_FLAGS)

test-nightly: check model
	TANDEM_TEST_PROFILE=nightly $(BIN)/python -m pytest -m "not gpu" --timeout 3600 $(PYTEST_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

bench-first-token: model
	$(BIN)/python -m bench.first_token $(BENCH_FLAGS)

bench-disconnect: model
	$(BIN)/python -m bench.disconnect $(BENCH_FLAGS)

# The default model, so that no test has to wait for it; tests themselves never download anything.
model: $(INSTALLED)
	@$(BIN)/tandem fetch

install: $(INSTALLED)

# torch comes first and alone: its index decides between the CPU and the CUDA build.
$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Tandem needs Python 3.11 or newer; this is $$($(PYTHON) --version). Set PYTHON=python3.12, say." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is not complete here. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV); the first time takes some minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
