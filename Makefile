# What a person and CI run alike. Needs Python 3.11 or newer with venv, and nothing else.
#
#   make demo    a whole service on this machine: three answers side by side, and where their time went
#   make serve   the same service, kept up
#   make test    format, lint, types, import directions and every test, in some minutes
#   make check   the same without the tests
#   make node-clients   what the tests of Node's clients need, where npm is; `make test` does it by itself
#   make test-openapi   10,000 requests made up from the OpenAPI document, to a real service; N= for another number
#   make test-nightly   the long tests too
#   make chaos   four minutes of faults of every kind on a local cluster under load; CHAOS_FLAGS= for other plans
#   make test-ray-up   `ray up` over ssh on two machines that are namespaces of this one, some minutes; needs root and sshd
#   make bench-partition   a real link between two network namespaces that loses packets and fails; needs root
#   make fuzz    a million inputs for every parser of what comes from elsewhere; FUZZ_FLAGS= for fewer. Installs atheris
#   make test-web   the page in a headless Chromium (Debian: apt install chromium), with pictures of it in build/page
#   make soak    two hours of mixed load on real processes: does anything grow, is anything left behind?
#   make bench-first-token, bench-disconnect   what the split costs, for docs/performance.md
#   make bench-http   what the gateway costs a token, by HTTP and by gRPC
#   make bench-tools   answers held to 160 real tool schemas: do all that end parse and validate?
#   make bench-engine   our engine on this CPU beside others; WRITE=1 puts the tables into docs/performance.md
#                VLLM_PYTHON= HF_FOLDER= [VLLM_PRELOAD=] and LLAMA_BIN= GGUF= name those that are not transformers
#   make test-gpu, bench-gpu, bench-kernels   on a machine with a GPU, where nothing has to be installed by this file:
#                without .venv they take python3, with torch, triton, pytest and hypothesis; bench-gpu writes its tables
#   make clean   removes what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Done again only when a pin or a dependency changes.
INSTALLED := $(VENV)/.installed
NODE_CLIENTS := tests/node/node_modules/.installed
PACKAGES := kernels engine kvtransfer prefill_worker decode_worker cluster bench tests
TORCH := torch==2.13.0
ALONE := tests/sim tests/e2e tests/bench tests/golden tests/browser
SERVE_FLAGS ?=
PYTEST_FLAGS ?=
# Finds what in the page keeps people out; where there is no npm, those tests are skipped.
AXE := axe-core@4.14.1
BENCH_FLAGS ?=
FUZZ_FLAGS ?=
N ?= 10000
CHAOS_FLAGS ?= --plan bench/chaos_plan.yaml --config bench/chaos_cluster.yaml
# The Python that sees the GPU.
GPU_PYTHON ?= $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
# Most of a GPU test's time is compiling, on one core: where pytest-xdist is at hand, on all.
GPU_WORKERS ?= $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && nproc)
VLLM_FLAGS = $(if $(VLLM_PYTHON),--vllm-python $(VLLM_PYTHON) --hf-folder $(HF_FOLDER)) \
  $(if $(VLLM_PRELOAD),--vllm-preload $(VLLM_PRELOAD))
LLAMA_FLAGS = $(if $(LLAMA_BIN),--llama-bin $(LLAMA_BIN) --gguf $(GGUF))
write = $(if $(WRITE),--write $(1))
# Several processes share the cores: a thread that waits must not spin on one that another could use.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo serve soak fuzz test test-nightly test-openapi test-gpu test-web test-ray-up check model node-clients clean install
.PHONY: cuda-device
.PHONY: chaos bench-partition bench-first-token bench-disconnect bench-http bench-tools bench-engine bench-kernels bench-gpu

demo: $(INSTALLED)
	@$(BIN)/tandem demo

serve: $(INSTALLED)
	@$(BIN)/tandem serve $(SERVE_FLAGS)

# What starts processes or takes every core by itself runs alone, or it would measure its neighbours.
test: check model node-clients
	$(BIN)/python -m pytest -m "not nightly and not gpu" -n auto --maxprocesses 4 --dist loadfile $(ALONE:%=--ignore %) \
	  $(PYTEST_FLAGS)
	$(BIN)/python -m pytest -m "not nightly and not gpu" $(ALONE) $(PYTEST_FLAGS)

test-nightly: check model node-clients
	TANDEM_TEST_PROFILE=nightly $(BIN)/python -m pytest -m "not gpu" --timeout 3600 $(PYTEST_FLAGS)

test-openapi: model
	$(BIN)/python -m tests.http_api.openapi_campaign --cases $(N)

test-gpu: cuda-device
	$(GPU_PYTHON) -m pytest -c tests/gpu.ini --rootdir . -m gpu \
	  $(if $(GPU_WORKERS),-n $(GPU_WORKERS) --dist worksteal) $(PYTEST_FLAGS)

test-web: $(INSTALLED) model
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[web]'
	command -v npm >/dev/null && npm install --silent --no-save --prefix build/axe $(AXE) || true
	$(BIN)/python -m pytest tests/browser $(PYTEST_FLAGS)
	@cat build/page/measured.txt 2>/dev/null || true

test-ray-up: model
	$(BIN)/python -m pytest -s -rs -m nightly tests/deploy/ray_up/test_ray_up.py $(PYTEST_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_house.py

chaos: model
	@$(BIN)/tandem chaos $(CHAOS_FLAGS)

bench-partition: model
	$(BIN)/python -m bench.partition $(BENCH_FLAGS)

fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.campaign $(FUZZ_FLAGS)

soak: model
	$(BIN)/python -m bench.soak $(BENCH_FLAGS)

bench-first-token: model
	$(BIN)/python -m bench.first_token $(BENCH_FLAGS)

bench-disconnect: model
	$(BIN)/python -m bench.disconnect $(BENCH_FLAGS)

bench-http: model
	$(BIN)/python -m bench.http_overhead $(BENCH_FLAGS)

bench-tools: model
	$(BIN)/python -m bench.tool_schemas $(BENCH_FLAGS)

bench-engine: model
	$(BIN)/python -m bench.engine --dtype float32 $(call write,engine-float32) $(VLLM_FLAGS) $(BENCH_FLAGS)
	$(BIN)/python -m bench.engine --dtype bfloat16 $(call write,engine-bfloat16) $(VLLM_FLAGS) $(BENCH_FLAGS)
	$(BIN)/python -m bench.engine --weights int4,int8 --batches 1,8 $(call write,engine-integer) \
	  --no-transformers $(LLAMA_FLAGS) $(BENCH_FLAGS)

bench-kernels: cuda-device
	$(GPU_PYTHON) -m bench.kernels $(BENCH_FLAGS)

# Tile sizes first: what the kernels' benchmark has chosen, the engine runs with.
bench-gpu: cuda-device
	$(GPU_PYTHON) -m bench.kernels --tune --write
	$(GPU_PYTHON) -m bench.engine --device cuda --dtype bfloat16 --random llama-3.1-8b --context 2048 \
	  --prefill 512,2048,8192 --batches 1,8,32,64,128 --rounds 3 --tune --write gpu-engine $(BENCH_FLAGS)

cuda-device:
	@$(GPU_PYTHON) -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || \
	  { echo "no CUDA device that $(GPU_PYTHON) can use; GPU_PYTHON= names another Python" >&2; exit 2; }

# The default model, so that no test has to wait for it; tests themselves never download anything.
model: $(INSTALLED)
	@$(BIN)/tandem fetch

# Without npm the tests of Node's clients are skipped, and say why.
node-clients: $(if $(shell command -v npm),$(NODE_CLIENTS))

$(NODE_CLIENTS): tests/node/package-lock.json
	npm ci --prefix tests/node --no-audit --no-fund
	@touch $@

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
	@$(BIN)/python -m kernels.cpu.library
	@touch $@

clean:
	rm -rf $(VENV) tests/node/node_modules *.egg-info build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
