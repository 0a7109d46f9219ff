# make demo    trains a small language model with jax_fa3 attention (examples/train_lm.py); FLAGS="--steps 50" for flags
# make gputest the tests of tests/gpu, and a failure where there is no Hopper GPU
# make test    the whole test suite; PYTEST="-k causal" for pytest's own arguments
# make lint    ruff, clang-format, pyright, buildifier          make format   what of it can be repaired by a tool
# make kernels compiles the kernels and checks what the compiler made of them (tools/check_kernels.py)
# make wheel   dist/*.whl                                       make bench    the benchmark (needs the GPU it is to measure)
# make figures every mode of the benchmark into RESULTS (benchmarks/results), the documents' tables and plots from those
#
# Each sets up .venv with what it needs; a second call is quick. JAX_FA3_CPU_ONLY=1 leaves the kernels out.
# PYTHON=python3.12 VENV=.venv312 chooses another interpreter; PY=/some/python uses an environment as it is, with no set-up.

PYTHON ?= python3
VENV ?= .venv
FLAGS ?=
PYTEST ?=
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test gputest gtest lint format kernels wheel bench figures clean

# The set of versions that CI pins; other Pythons take the newest that pyproject.toml allows. CONSTRAINTS= turns it off.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS ?= $(wildcard tools/constraints-$(PYTHON_VERSION).txt)
GPU := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -1)
PLUGIN := $(if $(GPU),cuda13)
# More workers than cores only fight; more than 8 fight for memory.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
FLAVOUR := $(if $(filter-out 0 false off no,$(JAX_FA3_CPU_ONLY)),cpu,cuda)
COMPILED := pyproject.toml CMakeLists.txt $(wildcard build_backend/*.py) $(shell find cuda ffi -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

ifdef PY
needs =
else
PY := $(VENV)/bin/python
needs = $(VENV)/.package-$(FLAVOUR) $(VENV)/.$(1)
endif
INSTALL = $(PY) -m pip install -qq --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# ---- the environment ----

$(VENV)/bin/python:
	@echo "== Python $(PYTHON_VERSION) environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# One stamp a set of requirements. They are installed apart from the package, so none of them builds the extension again.
$(VENV)/.demo: EXTRAS = examples
$(VENV)/.test: EXTRAS = test
$(VENV)/.bench: EXTRAS = bench
$(VENV)/.dev: EXTRAS = dev
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.dev: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "== installing the requirements of extras $(strip $(EXTRAS) $(PLUGIN))"
	$(PY) tools/requirements.py $(EXTRAS) $(PLUGIN) > $(VENV)/requirements.txt
	$(INSTALL) -r $(VENV)/requirements.txt
	@touch $@

# Editable: Python files are used where they lie, only changed C++ and CUDA is compiled again (build/ keeps the objects).
$(VENV)/.package-$(FLAVOUR): $(COMPILED) | $(VENV)/bin/python
	@echo "== building jax_fa3 ($(if $(filter cpu,$(FLAVOUR)),pure Python,with its kernels: a minute or two))"
	$(INSTALL) --editable .
	@rm -f $(VENV)/.package-*
	@touch $@

define say_gpu
	@if [ -n "$(GPU)" ]; then echo "== GPU: $(GPU)"; else \
	  echo "== No NVIDIA GPU on this machine: attention runs on its CPU path (implementation xla), the kernels are not run."; fi
endef

# ---- the commands ----

demo: $(call needs,demo)
	$(say_gpu)
	$(PY) examples/train_lm.py $(FLAGS)

# GoogleTest first, so that pytest's closing line is the last one. JAX_FA3_STRICT=1 makes warnings errors (CI's pinned
# versions). An environment given by PY may lack pytest's plugins.
test: $(call needs,test) gtest
	$(say_gpu)
	$(PY) -m pytest $$($(PY) -c 'import pytest_timeout, xdist' 2>/dev/null && printf '%s ' -n $(WORKERS) --timeout 600) $(if $(filter 1,$(JAX_FA3_STRICT)),-W error) $(PYTEST)

# The tests of the kernels, on a Hopper GPU or not at all; XLA's search for the fastest GEMM would take longer than they do.
gputest: $(call needs,test)
	XLA_FLAGS=--xla_gpu_autotune_level=0 XLA_PYTHON_CLIENT_PREALLOCATE=false JAX_FA3_REQUIRE_GPU=1 JAX_FA3_REQUIRE_EXTENSION=1 \
	  $(PY) -m pytest -m gpu tests/gpu -n $(WORKERS) $(PYTEST)

gtest: $(call needs,test)
	@if ! echo '#include <gtest/gtest.h>' | $${CXX:-c++} -x c++ -E - >/dev/null 2>&1; then \
	  echo "== GoogleTest is not installed (Debian: apt-get install libgtest-dev): the tests in tests/cuda are skipped."; \
	else \
	  PATH="$(dir $(abspath $(PY))):$$PATH"; \
	  cmake -S . -B build/host -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=RelWithDebInfo -DJAX_FA3_BUILD_EXTENSION=OFF -DJAX_FA3_BUILD_TESTS=ON; \
	  ninja -C build/host --quiet; \
	  ctest --test-dir build/host --output-on-failure --no-tests=error --progress; \
	fi

kernels: $(call needs,dev)
	$(PY) tools/check_kernels.py

lint: $(call needs,dev)
	$(PY) tools/lint.py

format: $(call needs,dev)
	$(PY) tools/lint.py --fix

wheel:
	$(PYTHON) -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .

bench: $(call needs,bench)
	$(say_gpu)
	$(PY) benchmarks/attention.py $(FLAGS)

# With several GPUs parallel.json too. Without one RESULTS must name another folder than the one of the figures that count;
# --smoke in FLAGS shows only that it works. docs/ablation.md and the demo's figures have commands of their own.
RESULTS ?= benchmarks/results
figures: $(call needs,bench)
	$(say_gpu)
	@[ -n "$(GPU)" ] || [ "$(RESULTS)" != benchmarks/results ] || { echo "== These are not for benchmarks/results: RESULTS=/some/folder"; exit 1; }
	status=0; \
	for run in grid=forward backward=backward shapes=shapes launch=launch length=memory parallel=parallel; do \
	  $(PY) benchmarks/attention.py --mode=$${run%=*} --output=$(RESULTS)/$${run#*=}.json $(FLAGS) || status=1; \
	done; \
	if [ "$(RESULTS)" = benchmarks/results ]; then $(PY) benchmarks/report.py; fi; \
	exit $$status

clean:
	rm -rf build dist .venv*
