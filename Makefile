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

# The CPU wheel of torch where pip can find one; set TORCH to choose another build.
TORCH ?= torch==2.13.0

.PHONY: demo test lint sanitize mutants thorough bench vendors gpu clean model node

demo: $(STAMP) model
	@$(BIN)/ktcore run "$$($(BIN)/python -m ktcore.demo --path)" --temperature 0 "$(PROMPT)"

model: $(STAMP)
	@$(BIN)/python -m ktcore.demo

test: $(DEV) model lint sanitize node
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer, their threads under ThreadSanitizer.
sanitize: $(DEV)
	$(BIN)/python tests/sanitize/run.py

# What every day draws a few of: more seeds of delays and of mixed requests, every sanitized instruction set.
thorough: $(DEV) model
	KTCORE_TEST_SEEDS=20 $(BIN)/pytest tests/parity/test_hybrid.py tests/server/test_service.py
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
	$(PYTHON) -m venv $(VENV)

# Built without isolation so that the native module compiles against the environment's own pybind11.
$(STAMP): $(BUILD_INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --upgrade "$(TORCH)" "scikit-build-core>=0.10" pybind11 hatchling editables setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	@touch $@

$(DEV): $(STAMP) $(SIM_INPUTS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(foreach v,$(PLUGINS),$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable ./$(v) &&) true
	@touch $@

$(NODE): tests/server/node/package.json tests/server/node/package-lock.json
	@mkdir -p $(@D)
	@if command -v node >/dev/null && command -v npm >/dev/null; then \
	    cp $^ $(@D) && npm ci --prefix $(@D) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@ || \
	        echo "the openai package for Node could not be installed: its test will be skipped"; \
	else echo "there is no node or npm: the test of the openai SDK for Node will be skipped"; fi
