# Everything sets itself up: each target works alone on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint bench compiled triton-versions gpu-check clean

venv: $(STAMP)

# torch first and by its exact pin: elsewhere a looser one would bring gigabytes of CUDA packages.
$(STAMP): constraints.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 triton==3.7.1
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		setuptools wheel build cmake ninja ruff clang-format mypy pre-commit types-tqdm
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation -e ".[model,test]"
	touch $@

demo: venv
	$(BIN)/python examples/demo.py

# ARGS="--full" runs the full grid, ARGS="tests/test_mla_decode.py" one file. One process per core,
# each with one thread: most of the time goes into emulated kernels, which have no other use for two.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
	$(BIN)/mypy

bench: venv
	$(BIN)/python -m pytest bench --benchmark-only

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
