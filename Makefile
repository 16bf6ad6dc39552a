# Everything sets itself up: each target works alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-sanitize lint bench compiled triton-versions gpu-check clean

venv: $(STAMP)

# torch first and by its exact pin: elsewhere a looser one would bring gigabytes of CUDA packages.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 triton==3.7.1
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		setuptools wheel build cmake ninja ruff clang-format mypy pre-commit types-tqdm
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation -e ".[model,train,test]"
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

# ARGS="--full" runs the full grid, ARGS="tests/test_mla_decode.py" one file. One process per core,
# each with one thread: most of the time goes into emulated kernels, which have no other use for two.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

# The CPU library built with sanitizers, under the tests of its own backends: out-of-bounds accesses and
# undefined behaviour, in the portable build and the wider of those for AVX-512 that this host runs; then
# data races, in the portable build, since threads know nothing of instruction sets. The runtime of a
# sanitizer must be the first library of the process, and its report is on stderr, hence --capture=sys.
# Memory that intrinsics reach (masked accesses, AMX tiles) is seen by neither: the portable build of the
# same text and the poison around the tests' tensors stand in for that.
SANITIZE_TESTS = $(patsubst kimi_ops/cpu/%.py,tests/test_%.py,$(filter-out kimi_ops/cpu/_%,$(wildcard kimi_ops/cpu/*.py)))
SANITIZE_RUN = OMP_NUM_THREADS=1 KIMI_OPS_CPU_LIBRARY=$(abspath build/sanitize)
# GCC 12's libtsan stops where Linux places libraries as freely as new kernels do.
FIXED_ADDRESSES = $(shell setarch -R true 2> /dev/null && echo setarch -R)
SANITIZE_PYTEST = $(BIN)/python -m pytest --numprocesses 2 --dist worksteal --max-worker-restart 0 \
	--capture=sys -k "cpu[" $(SANITIZE_TESTS) $(ARGS)

test-sanitize: venv build/sanitize/address build/sanitize/thread
	LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
		UBSAN_OPTIONS=print_stacktrace=1 $(SANITIZE_RUN)/address/libkimi_ops_cpu.so \
		$(SANITIZE_PYTEST) --own-threads 2
	LD_PRELOAD=$$($(CXX) -print-file-name=libtsan.so) TSAN_OPTIONS=halt_on_error=1 \
		$(SANITIZE_RUN)/thread/libkimi_ops_cpu.so \
		$(FIXED_ADDRESSES) $(SANITIZE_PYTEST) --own-threads 3

AVX512 = $(if $(shell grep -m 1 avx512_bf16 /proc/cpuinfo),avx512,avx512f)

# CMake knows what has changed, so these are made every time.
.PHONY: build/sanitize/address build/sanitize/thread
build/sanitize/address: SANITIZE = address,undefined "-DKIMI_ISAS=scalar;$(AVX512)"
build/sanitize/thread: SANITIZE = thread -DKIMI_ISAS=scalar
build/sanitize/address build/sanitize/thread: venv
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B $@ -G Ninja -DCMAKE_CXX_COMPILER=$(CXX) \
		-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -g1" -DKIMI_SANITIZE=$(SANITIZE) --log-level=WARNING
	PATH="$(abspath $(BIN)):$$PATH" cmake --build $@

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

# A quarter of an hour or a little more on a quiet machine. ARGS="--full" measures everything, ARGS="--op rms_norm" one op.
bench: venv
	$(BIN)/kimi-ops bench --out build/bench $(ARGS)

# Every kernel at every tile for every architecture: most of an hour. ARGS="--op rms_norm" does one op.
compiled: venv
	$(BIN)/kimi-ops compile --markdown docs/compiled-kernels.md $(ARGS)

# One case of every kernel with five versions of Triton in environments under build/: an hour.
triton-versions: venv
	$(BIN)/python tools/triton_versions.py $(ARGS)

# On a machine with a GPU: everything in docs/gpu-day.md, and a report. PYTHON names an environment
# with a torch that has CUDA.
gpu-check:
	$(PYTHON) tools/gpu_check.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kimi_ops/_lib
