# Newcomer's commands: `make demo` answers a prompt, `make test` runs every check. Both set everything up first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
NODE   := build/node/.installed
PROMPT ?= Explain in two sentences what a mixture-of-experts language model is.

BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
PLUGINS := $(wildcard backends/cuda backends/rocm backends/xpu backends/npu backends/sim backends/triton)
SIM_INPUTS := $(shell find backends/sim/csrc backends/sim/setup.py 2>/dev/null)

# TORCH is the version, TORCH_INDEX the index to take it from: from PyPI it comes with CUDA's libraries (gigabytes), from
# https://download.pytorch.org/whl/cpu for CPUs alone.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

# One line for each step that takes a while, with what it will take; one more that names the step which failed.
STEP    := @printf '==> %s\n'
or_fail  = || { printf '==> failed: %s; the lines above say why\n' '$(1)' >&2; exit 1; }
PIP     := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo dev test lint sanitize mutants thorough bench vendors gpu clean model node

demo: $(STAMP) model
	$(STEP) "answering: $(PROMPT)"
	@$(BIN)/ktcore run "$$($(BIN)/python -m ktcore.demo --path)" --temperature 0 "$(PROMPT)" $(call or_fail,answering)

model: $(STAMP)
	@$(BIN)/python -m ktcore.demo $(call or_fail,fetching the demo model)

# The environment for working on ktcore: everything that tests need, the backends editable; runs nothing.
dev: $(DEV) model
	$(STEP) "ready: . $(VENV)/bin/activate"

# Each of the first four is one process most of the time: two at once. The longest files begin (tests/conftest.py).
test: $(DEV)
	@$(MAKE) --no-print-directory -j 2 model sanitize lint node
	$(STEP) "tests: some eight minutes on two cores"
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(call or_fail,tests)

lint: $(DEV)
	$(STEP) "lint and types: a minute or two, seconds when run again"
	@$(BIN)/ruff check . $(call or_fail,ruff check)
	@$(BIN)/ruff format --check . $(call or_fail,ruff format)
	@$(BIN)/mypy $(call or_fail,mypy)
	@$(BIN)/lint-imports $(call or_fail,lint-imports)

# The kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer, their threads under ThreadSanitizer.
sanitize: $(DEV)
	@$(BIN)/python tests/sanitize/run.py $(call or_fail,sanitizers)

# What every day draws a few of: more seeds of delays and of mixed requests, thousands of tokens for perplexity, every
# sanitized instruction set.
thorough: $(DEV) model
	$(STEP) "many seeds and tokens, then every instruction set under sanitizers: an hour on two cores"
	KTCORE_TEST_SEEDS=20 KTCORE_TEST_WINDOWS=8 $(BIN)/pytest tests/parity/test_hybrid.py tests/parity/test_perplexity.py tests/server/test_service.py
	$(BIN)/python tests/sanitize/run.py --all

# Small faults drawn from a room, and whether its tests notice them: docs/mutation-testing.md.
# AGAIN=1 tries those that the last run left alive.
ROOM ?= weights
N    ?= 60
SEED ?= 0
mutants: $(DEV)
	$(BIN)/python tests/mutation/run.py $(ROOM) -n $(N) --seed $(SEED) $(if $(AGAIN),--survivors)

# The openai SDK for Node, which a test runs; it skips, and says so, where there is no npm.
node: $(NODE)

bench: $(DEV) model
	$(BIN)/ktcore bench "$$($(BIN)/python -m ktcore.demo --path)" -p 512 -n 128

# What is too slow for every day, hours on two cores: every configuration of the shared kernels compiled and interpreted,
# the product in C++ for every chip that nvcc and clang's HIP (Debian: hipcc clang-19 lld-19) know, where those are,
# SYCL kernels on the OpenCL CPU device (their runtime goes to build/sycl), Triton kernels to HIVM (build/ascend), the
# kit for each simulated vendor, the matrix.
vendors: $(DEV)
	KTCORE_TRITON_FULL=1 KTCORE_VENDORS_FULL=1 $(BIN)/pytest tests/triton_kernels tests/vendors
	$(BIN)/python tests/vendors/sycl/run.py --venv build/sycl
	$(BIN)/python tests/triton_kernels/ascend/run.py --venv build/ascend
	$(foreach v,cuda rocm xpu npu,$(BIN)/python tests/vendors/simulate.py --backend $(v) -- conformance run --backend $(v) --level 4 --report docs/conformance/$(v)-simulated.json &&) true
	$(BIN)/ktcore conformance render docs/conformance

# On a machine with an NVIDIA GPU, in under eight minutes and without a network or an installation.
gpu:
	$(PYTHON) tests/vendors/gpu.py

clean:
	rm -rf $(VENV) build

$(VENV)/bin/python:
	$(STEP) "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) $(call or_fail,making $(VENV): Debian has it in python3-venv)

# Built without isolation so that the native module compiles against the environment's own pybind11.
$(STAMP): $(BUILD_INPUTS) | $(VENV)/bin/python
	$(STEP) "installing $(TORCH): 0.2 GB to fetch for CPUs alone, gigabytes with CUDA (TORCH_INDEX in the Makefile chooses)"
	@$(PIP) install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(call or_fail,installing $(TORCH))
	$(STEP) "installing what builds ktcore: seconds"
	@$(PIP) install --quiet --upgrade "scikit-build-core>=0.10" pybind11 hatchling editables setuptools wheel $(call or_fail,installing what builds ktcore)
	$(STEP) "compiling the CPU kernels and installing ktcore: some minutes on two cores, less with ccache or when run again"
	@$(PIP) install --quiet --no-build-isolation --editable ".[server]" $(call or_fail,building and installing ktcore)
	@touch $@

$(DEV): $(STAMP) $(SIM_INPUTS)
	$(STEP) "installing what tests need and the backends, sim with C++ of its own: two minutes"
	@$(PIP) install --quiet --no-build-isolation "ktcore[dev]" $(foreach v,$(PLUGINS),--editable ./$(v)) $(call or_fail,installing what tests need)
	@touch $@

$(NODE): tests/server/node/package.json tests/server/node/package-lock.json
	$(STEP) "fetching the openai SDK for Node: seconds"
	@mkdir -p $(@D)
	@if command -v node >/dev/null && command -v npm >/dev/null; then \
	    cp $^ $(@D) && npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@ || \
	        echo "the openai package for Node could not be installed: its test will be skipped"; \
	else echo "there is no node or npm: the test of the openai SDK for Node will be skipped"; fi
