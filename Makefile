# A fresh machine needs `make demo` and `make test`; each sets up what it needs, and they share a build.
#
#   make demo        train a next-token model with a two-million-row table, against torch's optimizers
#   make test        all tests of the CPU build, C++ and Python
#   make check       what else must hold: lint, cuda-build, cuda-on-cpu, cmake-build, add-rule, fuzz
#   make bench       the CPU benchmarks, results in benchmarks/results
#   make wheel       a wheel and an sdist in dist/, tried in an empty venv
#   make gpu-check   on a machine with a GPU: build, tests, compute-sanitizer, benchmarks
#   make sanitize    the tests of the CPU kernels under AddressSanitizer and UBSan
#
# The parts of `make check`:
#   make lint        formatting, lint and types
#   make cuda-build  compile the CUDA kernels and test against the CUDA build of torch, without a GPU
#   make cuda-on-cpu the CUDA kernels' source run on the CPU under sanitizers
#   make cmake-build the extension built by CMake: imported (CPU torch), compiled (CUDA torch)
#   make add-rule    a rule added as docs/design.md says, in a copy of the project
#   make fuzz        random programs against a model, mutated state dicts under AddressSanitizer;
#                    FUZZ_SECONDS=300 of them, FUZZ_ARGS="--seed 7 --programs 1" (tests/fuzz);
#                    the first time some 4 minutes more, for a build with sanitizers

PYTHON ?= python3
export MAX_JOBS ?= 2
export CUDA_HOME ?= /usr/local/cuda
export PIP_DISABLE_PIP_VERSION_CHECK = 1

VENV := .venv
CUDA_VENV := .venv-cuda
WHEEL_VENV := .venv-wheel
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
CPP_FILES := $(filter-out %.md,$(shell find csrc tests/cpp tests/cuda_on_cpu -type f \
  -not -name '*.py' -not -name '*.pyc'))
# Tests on all cores, and torch on one thread but where a test asks for more. `make cuda-build` runs
# those of the kernels in turn as well, with torch on all cores.
PARALLEL := -n auto --dist worksteal
THREADED := test_dense test_rows test_determinism test_two_threads
BENCHMARKS := sparse dense small_tensors embedding_step embedding_options lazy compact_state clip

.PHONY: all build demo test test-cpp check bench wheel lint sanitize cuda-build cuda-on-cpu \
  cmake-build add-rule fuzz gpu-check clean
all: build

$(VENV)/.ready: requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/test.txt
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation --no-deps -e .
	touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/python examples/next_token.py

test-cpp: $(VENV)/.ready
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
	$(BIN)/cmake --build build/cpp
	$(BIN)/ctest --test-dir build/cpp --output-on-failure

# The C++ tests first: pytest's closing line is the verdict's summary.
test: build test-cpp
	OMP_NUM_THREADS=1 TIGER_EXT_REQUIRE_NATIVE=1 $(BIN)/python -m pytest $(PARALLEL) tests

check: lint cuda-build cuda-on-cpu cmake-build add-rule fuzz

$(VENV)/.bench: $(VENV)/.ready requirements/bench.txt
	DS_BUILD_OPS=0 $(BIN)/pip install -q -r requirements/bench.txt
	touch $@

bench: build $(VENV)/.bench
	for name in $(BENCHMARKS); do PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/bench_$$name.py || exit 1; done
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/plot_step_time.py

wheel: $(VENV)/.ready
	rm -rf dist build/lib.*
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .
	$(BIN)/python setup.py -q sdist
	$(PYTHON) -m venv --clear $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/pip install -q $$(grep '^torch==' requirements/test.txt) dist/*.whl
	cd dist && TIGER_EXT_REQUIRE_NATIVE=1 ../$(WHEEL_VENV)/bin/python -m tiger_ext

$(VENV)/.lint: $(VENV)/.ready requirements/lint.txt
	$(BIN)/pip install -q -r requirements/lint.txt
	touch $@

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy tiger_ext

# The sanitizers' runtimes must come first in the process, hence LD_PRELOAD; leaks of the interpreter
# are not ours.
SANITIZED := LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. TIGER_EXT_REQUIRE_NATIVE=1
PYTEST := -m pytest -c $(CURDIR)/pyproject.toml --rootdir $(CURDIR)

build/sanitize/.built: $(VENV)/.ready $(SOURCES) $(wildcard tiger_ext/*.py)
	rm -rf build/sanitize/lib
	TIGER_EXT_SANITIZE=address,undefined $(BIN)/python setup.py -q build \
	  --build-lib build/sanitize/lib --build-temp build/sanitize/temp
	touch $@

sanitize: build/sanitize/.built
	cd build/sanitize/lib && OMP_NUM_THREADS=2 $(SANITIZED) \
	  $(CURDIR)/$(BIN)/python $(PYTEST) \
	  $(CURDIR)/tests/test_rows.py $(CURDIR)/tests/test_dense.py

# Both parts run, whatever the first one finds.
FUZZ_SECONDS ?= 300
FUZZ_ARGS ?= --seed 1
FUZZ := tests/fuzz --seconds $$(($(FUZZ_SECONDS) / 2)) $(FUZZ_ARGS)
fuzz: build build/sanitize/.built
	failed=0; export OMP_NUM_THREADS=1 TIGER_EXT_REQUIRE_NATIVE=1; \
	$(BIN)/python $(FUZZ) --only programs --json build/fuzz-programs.json || failed=1; \
	cd build/sanitize/lib && $(SANITIZED) $(CURDIR)/$(BIN)/python $(CURDIR)/$(FUZZ) \
	  --only checkpoints --json $(CURDIR)/build/fuzz-checkpoints.json || failed=1; \
	$(SANITIZED) $(CURDIR)/$(BIN)/python $(PYTEST) -q $(CURDIR)/tests/test_two_threads.py \
	  $(CURDIR)/tests/test_checked_memory.py || failed=1; \
	exit $$failed

# Every CUDA kernel, compiled by the host compiler and run by the emulator in tests/cuda_on_cpu.
EMULATED := test_dense test_rows test_determinism test_optimizer test_checked_memory
EMULATED_NATIVE := test_directions test_relative_lr test_accumulation test_touched_rows test_nonfinite \
  test_storage
EMULATED_LAZY := test_lazy test_history test_grad_scaler test_checkpointing test_schedulers \
  test_torch_contract_lazy test_freezing test_handed_on test_other_writers test_changes
EMULATE = cd build/cuda-on-cpu/lib && OMP_NUM_THREADS=1 TIGER_EXT_CUDA_ON_CPU=1 $(SANITIZED) \
  $(CURDIR)/$(BIN)/python $(PYTEST) $(PARALLEL)
cuda-on-cpu: $(VENV)/.ready
	rm -rf build/cuda-on-cpu && mkdir -p build/cuda-on-cpu
	g++ -std=c++20 -O1 -g1 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Itests/cuda_on_cpu/include tests/cuda_on_cpu/emulator.cpp tests/cuda_on_cpu/selftest.cpp \
	  -o build/cuda-on-cpu/selftest
	build/cuda-on-cpu/selftest
	g++ -std=c++20 -O1 -g1 -Wall -Wextra -fsanitize=address,undefined -fno-sanitize-recover=all \
	  -Itests/cuda_on_cpu/include -Icsrc tests/cuda_on_cpu/emulator.cpp \
	  csrc/cuda/fault_memory.cpp csrc/step/faults.cpp tests/cuda_on_cpu/faults_test.cpp \
	  -o build/cuda-on-cpu/faults_test
	build/cuda-on-cpu/faults_test
	TIGER_EXT_SANITIZE=address,undefined $(BIN)/python tests/cuda_on_cpu/setup.py -q build \
	  --build-lib build/cuda-on-cpu/lib --build-temp build/cuda-on-cpu/temp
	$(EMULATE) $(CURDIR)/tests/cuda_on_cpu $(EMULATED:%=$(CURDIR)/tests/%.py)
	$(EMULATE) $(EMULATED_NATIVE:%=$(CURDIR)/tests/%.py) -k "not reference and not memory"
	$(EMULATE) $(EMULATED_LAZY:%=$(CURDIR)/tests/%.py) \
	  -k "not reference and not False and not fresh_process and not spawned"

$(CUDA_VENV)/.ready: requirements/test.txt requirements/cuda.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v '^torch==' requirements/test.txt | cat - requirements/cuda.txt > $(CUDA_VENV)/requirements.txt
	$(CUDA_VENV)/bin/pip install -q -r $(CUDA_VENV)/requirements.txt
	touch $@

# Built out of tree and tested from another folder: this folder holds the module for the CPU torch.
cuda-build: $(CUDA_VENV)/.ready
	rm -rf build/cuda && mkdir -p build/cuda/run
	TIGER_EXT_CUDA=1 TIGER_EXT_STRICT=1 TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" \
	  $(CUDA_VENV)/bin/python setup.py build \
	  --build-lib build/cuda/lib --build-temp build/cuda/temp > build/cuda/build.log 2>&1 \
	  || { cat build/cuda/build.log; exit 1; }
	for file in csrc/cuda/*.cu; do $(CUDA_HOME)/bin/nvcc --ptx -arch=compute_90 -O3 -std=c++20 \
	  -fmad=false -Icsrc $$file -o build/cuda/$$(basename $$file .cu).ptx || exit 1; done
	$(CUDA_VENV)/bin/python tests/kernel_resources.py build/cuda/build.log build/cuda/*.ptx
	cd build/cuda/run && PYTHONPATH=../lib TIGER_EXT_REQUIRE_NATIVE=1 \
	  ../../../$(CUDA_VENV)/bin/python -m tiger_ext
	cd build/cuda/run && PYTHONPATH=$(CURDIR)/build/cuda/lib TIGER_EXT_REQUIRE_NATIVE=1 \
	  OMP_NUM_THREADS=1 $(CURDIR)/$(CUDA_VENV)/bin/python $(PYTEST) $(PARALLEL) $(CURDIR)/tests
	cd build/cuda/run && PYTHONPATH=$(CURDIR)/build/cuda/lib TIGER_EXT_REQUIRE_NATIVE=1 \
	  $(CURDIR)/$(CUDA_VENV)/bin/python $(PYTEST) $(THREADED:%=$(CURDIR)/tests/%.py)

# For CUDA to PTX only: `make cuda-build` goes further.
CMAKE_TORCH = $(BIN)/cmake -S . -B build/cmake-$(1) -G Ninja -DTIGER_EXT_TORCH=ON \
  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(2)/bin/python \
  -DCMAKE_CUDA_COMPILER=$(CUDA_HOME)/bin/nvcc -DCMAKE_CUDA_ARCHITECTURES=90-virtual \
  && $(BIN)/cmake --build build/cmake-$(1) --target _C -j $(MAX_JOBS)
cmake-build: $(VENV)/.ready $(CUDA_VENV)/.ready
	$(call CMAKE_TORCH,cpu,$(VENV))
	cd build/cmake-cpu && PYTHONPATH=. TIGER_EXT_REQUIRE_NATIVE=1 $(CURDIR)/$(BIN)/python -m tiger_ext
	$(call CMAKE_TORCH,cuda,$(CUDA_VENV))
	cd build/cmake-cuda && PYTHONPATH=. TIGER_EXT_REQUIRE_NATIVE=1 \
	  $(CURDIR)/$(CUDA_VENV)/bin/python -m tiger_ext

add-rule: $(VENV)/.ready
	$(BIN)/python tests/add_rule.py build/add-rule

# Uses the Python at hand, with its torch, and no network.
gpu-check:
	$(PYTHON) tests/gpu_check.py $(ARGS)

clean:
	rm -rf build dist *.egg-info tiger_ext/_C.*.so $(VENV) $(CUDA_VENV) $(WHEEL_VENV)
