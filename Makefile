# `make` or `make help` lists the targets.
#
# Needs python3 (3.11 or newer) with venv, g++, make and git; everything else is installed into .venv and build.
# CMAKE_ARGS="-DGGML_CUDA=on" make build    builds llama.cpp with CUDA, as it does for llama-cpp-python.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
JOBS   ?= $(shell nproc)
TEST_JOBS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV   := $(CURDIR)/.venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
NATIVE := build/native
PIN    := native/cmake/llama-cpp-python.txt
SDIST  := .cache/llama_cpp_python-$(shell sed -n 's/^llama-cpp-python==\([^ ]*\).*/\1/p' $(PIN)).tar.gz
# Ninja and CMake come from the virtual environment.
export PATH := $(BIN):$(PATH)

.PHONY: help demo test test-models test-sanitize test-threads fuzz soak lint build web-ui test-page bench docs gpu-kit clean distclean FORCE

help:
	@echo 'make build          install the pinfer command into .venv and build the native part in build/native'
	@echo 'make web-ui         add the web page of `pinfer serve` to the build; needs npm and a network'
	@echo 'make demo           prepare and run a shipped model, then compare it with stock llama.cpp'
	@echo 'make test           build, then run all tests'
	@echo 'make test-models    check the recorded results of the tiny checkpoints against transformers (installs PyTorch)'
	@echo 'make test-sanitize  test the native code with the address and undefined-behaviour sanitizers'
	@echo 'make test-page      build the web page and use it in headless Chromium; needs npm, a network and Chromium'
	@echo 'make soak           test the server under load for 10 minutes'
	@echo 'make test-threads   test hot devices and several models at once with the thread sanitizer'
	@echo 'make fuzz           fuzz the readers of artefacts and graphs, FUZZ_SECONDS=120 each (needs Clang)'
	@echo 'make lint           check formatting, lint, types, and that docs/cli.md is up to date'
	@echo 'make bench          run the native benchmarks'
	@echo 'make docs           regenerate docs/cli.md'
	@echo 'make gpu-kit        pack an archive that builds, tests and measures pinfer on a GPU machine without a network'
	@echo 'make clean          remove build products (make distclean removes .venv and downloads too)'
	@echo
	@echo 'CMAKE_ARGS="-DGGML_CUDA=on" make build    build with CUDA; other llama.cpp backends work the same way'

# --- the virtual environment: llama-cpp-python at its pinned version, then the rest ----------------------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'pinfer needs Python 3.11 or newer; run: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS): | $(BIN)/python
	mkdir -p $@

$(SDIST): $(PIN) | $(BIN)/python
	mkdir -p $(@D)
	$(BIN)/pip download --quiet --no-deps --no-binary llama-cpp-python --require-hashes -r $(PIN) -d $(@D)
	touch $@

# RPC is on by default: it is one small file without dependencies. CMAKE_ARGS=-DGGML_RPC=off turns it off.
LLAMA_ARGS := $(strip -DGGML_RPC=on $(CMAKE_ARGS))

# This file changes only when the arguments do, which then rebuilds llama.cpp.
$(STAMPS)/cmake-args: FORCE | $(STAMPS)
	@echo '$(LLAMA_ARGS)' | cmp -s - $@ || echo '$(LLAMA_ARGS)' > $@

# pip caches built wheels by the path of the source, regardless of CMAKE_ARGS. So the default build uses its own path,
# and builds with other CMAKE_ARGS are not cached.
$(STAMPS)/llama: $(SDIST) $(STAMPS)/cmake-args
	@echo "$$(sed -n 's/.*--hash=sha256://p' $(PIN))  $(SDIST)" | sha256sum --check --quiet
	@echo 'Building llama.cpp: a few minutes, once'
	@mkdir -p $(<D)/rpc && ln -f $< $(<D)/rpc/
	CMAKE_ARGS='$(LLAMA_ARGS)' $(BIN)/pip install --quiet --no-deps --force-reinstall $(if $(CMAKE_ARGS),--no-cache-dir) \
	    $(<D)/rpc/$(<F)
	touch $@

$(STAMPS)/dependencies: pyproject.toml $(STAMPS)/llama
	$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	    print(*p["dependencies"], *p["optional-dependencies"]["dev"], sep="\n")' > $@.txt
	$(BIN)/pip install --quiet -r $@.txt
	touch $@

# The package runs from this tree, so that edits need no reinstallation and the native part is built once.
$(BIN)/pinfer: $(STAMPS)/dependencies
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $(STAMPS)/purelib
	echo '$(CURDIR)' > "$$(cat $(STAMPS)/purelib)/pinfer.pth"
	printf '#!%s\nimport sys\n\nfrom pinfer.__main__ import main\n\nsys.exit(main())\n' $(BIN)/python > $@
	chmod +x $@

# --- the native part -------------------------------------------------------------------------------------------------

# $(call configure,preset)
configure = cd native && cmake --preset $(1) -DCMAKE_PREFIX_PATH="$$(cat $(STAMPS)/purelib)" \
    -DPINFER_LLAMA_SDIST=$(CURDIR)/$(SDIST)

CMAKE_FILES := native/CMakeLists.txt native/CMakePresets.json $(wildcard native/cmake/*.cmake) $(PIN)

$(NATIVE)/build.ninja: $(CMAKE_FILES) $(STAMPS)/llama $(BIN)/pinfer
	$(call configure,release) --log-level=WARNING
	touch $@

build: $(NATIVE)/build.ninja
	@ninja --quiet -C $(NATIVE) -j $(JOBS)

# llama.cpp's page, built from the same source as the server. Whatever npm did, the page has to be in the result.
PAGE := $(NATIVE)/web-ui/ui.h
web-ui: $(NATIVE)/build.ninja
	@command -v npm >/dev/null || { echo 'make web-ui needs npm (Node.js 20 or newer)' >&2; exit 1; }
	@grep -qs '^#define LLAMA_UI_HAS_ASSETS' $(PAGE) || rm -f $(PAGE)
	@cmake -DPINFER_WEB_UI=ON --log-level=WARNING $(NATIVE) >/dev/null
	@ninja -C $(NATIVE) -j $(JOBS) pinfer-runner
	@grep -q '^#define LLAMA_UI_HAS_ASSETS' $(PAGE) || { echo 'npm could not build the page, see above' >&2; exit 1; }

# --- targets ---------------------------------------------------------------------------------------------------------

demo: build
	@$(BIN)/python -m pinfer.demo

# On a busy machine, OpenMP threads that spin while they wait make the tests ten times slower.
test test-sanitize: export OMP_WAIT_POLICY ?= passive

test: build
	@ninja --quiet -C $(NATIVE) -j $(JOBS) stock
	@$(BIN)/ctest --test-dir $(NATIVE) --output-on-failure --no-tests=error
	@$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile

soak: export OMP_WAIT_POLICY ?= passive
soak: build
	@PINFER_SOAK_SECONDS=600 $(BIN)/python -m pytest -q tests/test_serve.py -k many_clients --timeout 900

# A skipped test is a failure here.
test-page: web-ui
	@PINFER_TEST_PAGE=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q tests/test_page.py

# `make test` compares with recorded results of transformers; this target checks the recordings, in an environment with
# PyTorch. TORCH chooses another build of PyTorch than the default one, which includes CUDA.
TORCH ?= torch>=2.4
$(STAMPS)/models: pyproject.toml | $(STAMPS)
	$(PYTHON) -m venv $(VENV)/models
	$(VENV)/models/bin/pip install --quiet '$(TORCH)' 'transformers>=5.0' sentencepiece gguf
	touch $@

test-models: $(STAMPS)/models
	@$(VENV)/models/bin/python tools/make_checkpoints.py --check
	@$(VENV)/models/bin/python tools/models_tokenizers.py

# llama.cpp's server is compiled without sanitizers in either build, so this one takes the library of the first.
build/sanitize/build.ninja: $(CMAKE_FILES) $(STAMPS)/llama $(BIN)/pinfer
	$(call configure,sanitize) -DPINFER_SERVER_LIBRARY=$(CURDIR)/$(NATIVE)/libpinfer-llama-server.a --log-level=WARNING
	touch $@

# The Python tests that use the native code, with the sanitized plugin and runner. Types of weights are covered by the
# native tests. CPython is not built with sanitizers, so the runtime is preloaded, and leaks are not reported because
# most are the interpreter's.
SANITIZED_TESTS := $(patsubst %,tests/test_%.py,native profile run exact guest bad_input)
SANITIZED := test_native or test_profile or test_run or (test_exact and (F16 or Q4_0 or Q4_K)) or plugin_refuses or \
    runner_refuses or without_its_rows or two_engines or refused_configuration or other_weights

test-sanitize: build build/sanitize/build.ninja
	@ninja --quiet -C build/sanitize -j $(JOBS)
	@UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure --no-tests=error
	@PINFER_NATIVE_DIR=$(CURDIR)/build/sanitize LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -q -n $(TEST_JOBS) -k '$(SANITIZED)' $(SANITIZED_TESTS)

build/fuzz/build.ninja: $(CMAKE_FILES) $(STAMPS)/llama $(BIN)/pinfer
	@command -v clang++ > /dev/null || { echo 'make fuzz needs Clang; type: apt-get install clang libclang-rt-dev' >&2; exit 1; }
	$(call configure,fuzz) --log-level=WARNING
	touch $@

# Seconds for each fuzzer. What a longer run finds can be kept: copy it from build/fuzz/corpus to native/fuzz/corpus.
FUZZ_SECONDS ?= 120
fuzz: build/fuzz/build.ninja
	@ninja --quiet -C build/fuzz -j $(JOBS)
	@for name in readers graphs; do mkdir -p build/fuzz/corpus/$$name && \
	    build/fuzz/bin/fuzz_$$name -max_total_time=$(FUZZ_SECONDS) -timeout=5 -rss_limit_mb=4096 -print_final_stats=1 \
	    -max_len=65536 -artifact_prefix=build/fuzz/ build/fuzz/corpus/$$name native/fuzz/corpus/$$name || exit 1; done

build/thread/build.ninja: $(CMAKE_FILES) $(STAMPS)/llama $(BIN)/pinfer
	$(call configure,thread) --log-level=WARNING
	touch $@

# One thread in each OpenMP team: their library is not built with the sanitizer, which would take its barriers for races.
test-threads: export OMP_THREAD_LIMIT := 1
test-threads: build/thread/build.ninja
	@ninja --quiet -C build/thread -j $(JOBS) bin/test_models bin/test_hot
	@build/thread/bin/test_models 10
	@build/thread/bin/test_hot

lint: $(BIN)/pinfer
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy --strict pinfer models/synth.py tests tools kit/*.py
	@$(BIN)/python -m pinfer.cli.docs --check

bench: build
	@for bench in $(NATIVE)/bin/bench_*; do echo "$$bench"; $$bench; done

docs: $(BIN)/pinfer
	@$(BIN)/python -m pinfer.cli.docs

# The pinned Python packages of the GPU kit.
WHEELS := .cache/gpu-kit

$(WHEELS): kit/wheels.txt | $(BIN)/python
	rm -rf $@
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --require-hashes -r $< -d $@ \
	    --python-version 3.11 --implementation cp --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
	touch $@

gpu-kit: $(SDIST) $(WHEELS)
	@echo "$$(sed -n 's/.*--hash=sha256://p' $(PIN))  $(SDIST)" | sha256sum --check --quiet
	@$(BIN)/python kit/pack.py --sdist $(SDIST) --wheels $(WHEELS) build/pinfer-gpu-kit.tar.gz

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis models/*.pinfer
	find pinfer models tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv .cache
