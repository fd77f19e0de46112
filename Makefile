# One command each, from a fresh clone. Both `test` and `demo` use the active environment's torch if
# it is 2.11 or newer, else they make .venv and install torch==$(TORCH) there.

PYTHON ?= python3
TORCH ?= 2.13.0
JOBS ?= 2
PYTEST ?=
DEMO ?=

# Threads that sleep instead of spinning: on two busy cores, spinning ones run 3 to 6 times slower.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

environment = $(PYTHON) scripts/environment.py --torch "$(TORCH)"

.PHONY: help build test demo lint clean
.DEFAULT_GOAL := help

help:
	@echo "make build   build and install the package in place"
	@echo "make test    the whole test suite (JOBS=2 processes, PYTEST='-k gla' for more options)"
	@echo "make demo    train a byte-level model, sample it, plot (DEMO='--data PATH' for your text)"
	@echo "make lint    ruff, mypy, clang-format and spelling, as in CI"
	@echo "make clean   remove build outputs (.venv and demo/ stay)"
	@echo
	@echo "PYTHON=$(PYTHON) TORCH=$(TORCH) LSM_BUILD_CUDA=auto|0|1 LSM_CUDA_ARCHS='80;90a' MAX_JOBS=2"

build:
	@python=$$($(environment)) && \
		"$$python" -c "import json, lsm_cuda; print(json.dumps(lsm_cuda.build_info(), indent=1))"

test:
	@python=$$($(environment) --extras cli,test) && \
		"$$python" scripts/emulator.py && \
		LSM_REQUIRE_EMULATOR=1 "$$python" -m pytest -n $(JOBS) --dist worksteal $(PYTEST)

demo:
	@python=$$($(environment) --extras cli) && \
		"$$python" -m lsm_cuda.cli demo $(DEMO)

lint:
	@python=$$($(environment) --extras cli,dev) && \
		PATH="$$(dirname "$$python"):$$PATH" "$$python" -m pre_commit run --all-files

clean:
	rm -rf build dist *.egg-info lsm_cuda/*.so lsm_cuda/build_info.json
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
