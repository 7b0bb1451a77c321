# Two commands do all the set-up: `make demo` and `make test`.
# They need git, make and Python 3.11 or newer, and leave everything inside this directory.

VENV   ?= .venv
PYTHON ?=
PYTHONS = python3 python3.14 python3.13 python3.12 python3.11
PINS   ?=
ARGS   ?=

# Each test worker runs eight CPU devices: more workers than cores only wait for each other.
WORKERS ?= 2

DEMO = examples/language_model/train.py --preset demo --out demo

# The environments of the compilers of TPU and GPU.
TPU = .venv-tpu
GPU = .venv-gpu
COMPILED = python3.12 python3.13 python3.14

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --no-input
USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

# In this order they are the sections of benchmarks/results/<machine>.md.
BENCHMARKS = step_overhead norm compile_time strategies scaling per_example

.PHONY: help demo test test-library test-newcomer test-compilers bench accelerators compilers lint format notebooks docs reference clean

help:  ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12     the interpreter (default: the first usable of python3, python3.14 … 3.11)"
	@echo "  VENV=.venv-3.12       the environment directory"
	@echo "  PINS='jax==0.10.1'    further requirements for a new environment"
	@echo "  OPTIMIZED=1           test programs that XLA optimizes as it does by default: slower"
	@echo "  ARGS='-k zero -x'     further arguments for pytest, the demo or the benchmarks"

demo: $(VENV)/.examples  ## train the language model with and without a clip, and draw both
	@$(BIN)/python $(DEMO) $(ARGS)

test: $(VENV)/.dev  ## run all tests
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-library: $(VENV)/.test  ## run the tests of the package, which need few packages
	@$(BIN)/python -m pytest -n $(WORKERS) tests/library $(ARGS)

NEWCOMER = build/newcomer

test-newcomer: $(VENV)/.test  ## run the tests of the package with the strategy of docs/add_a_strategy.md
	@rm -rf $(NEWCOMER)
	@$(BIN)/python docs/add_a_strategy.py $(NEWCOMER)
	@cd $(NEWCOMER) && PYTHONPATH=$$PWD $(abspath $(BIN))/python -m pytest -n $(WORKERS) tests/library $(ARGS)

# PyTorch is measured too where it is installed: make bench VENV=.venv-bench PINS=torch
bench: $(VENV)/.examples  ## measure this library beside its peers (20 minutes of a quiet machine)
	@for name in $(BENCHMARKS); do \
	  $(BIN)/python benchmarks/$$name.py --out benchmarks/results $(ARGS) || exit; \
	done

test-compilers: compilers  ## run the tests of programs compiled for TPU and GPU
	@$(TPU)/bin/python -m pytest tests/library/test_compilers.py $(ARGS)
	@$(GPU)/bin/python -m pytest tests/library/test_compilers.py $(ARGS)

accelerators: compilers  ## compile for TPU and GPU, without one, and write the page (30 minutes)
	@$(TPU)/bin/python benchmarks/accelerators.py --tpu $(TPU)/bin/python --gpu $(GPU)/bin/python \
	  --out benchmarks/results/accelerators.md $(ARGS)

# Their jax, which is pinned, has wheels for Python 3.12 and newer.
compilers:
	@$(MAKE) -s VENV=$(TPU) PYTHONS='$(COMPILED)' $(TPU)/.tpu
	@$(MAKE) -s VENV=$(GPU) PYTHONS='$(COMPILED)' $(GPU)/.gpu

lint: $(VENV)/.dev  ## check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## fix style and format in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

notebooks: $(VENV)/.dev  ## execute the notebooks and write their twins with outputs
	@$(BIN)/python notebooks/execute.py

docs: $(VENV)/.dev  ## build the documentation into build/site
	@$(BIN)/python -m sphinx -W -n --keep-going -q -c docs -d build/doctrees . build/site
	@echo "The site is build/site/index.html."

reference:  ## say how to make the reference numbers anew (by hand)
	@echo "The numbers in tests/library/reference/*.json are made by hand. Those of other frameworks, with them:"
	@echo
	@echo "  python3 -m venv .venv-reference"
	@echo "  .venv-reference/bin/pip install torch tensorflow-cpu keras 'jax==0.10.2' 'optax==0.2.8'"
	@echo "  .venv-reference/bin/python tests/library/reference/make_reference.py"
	@echo
	@echo "What optax does to the hard cases, in the environment of the tests:"
	@echo
	@echo "  $(BIN)/python tests/library/reference/optax_behaviour.py"

clean:  ## remove the environments, the caches and the demo's output
	rm -rf .venv .venv-* demo build dist .hypothesis .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp in the environment says which dependency group is installed; a change of pyproject.toml
# installs it again. pip knows groups from 25.1 on.
GROUPS = test examples dev tpu gpu
$(GROUPS:%=$(VENV)/.%): $(VENV)/.%: pyproject.toml | $(VENV)/.made
	@echo "Installing gradclip-jax and the group $* into $(VENV); the first time takes a few minutes."
	@$(PIP) install -qq 'pip>=25.1'
	@$(PIP) install -qq -e . --group $* $(PINS)
	@touch $@

$(VENV)/.made:
	@if $(BIN)/python -c '$(USABLE)' 2>/dev/null && $(PIP) --version >/dev/null 2>&1; then \
	  touch $@; exit; \
	fi; \
	for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if $$python -c '$(USABLE)' 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python -V)."; \
	    $$python -m venv $(VENV) && touch $@; \
	    exit; \
	  fi; \
	done; \
	if [ -n "$(PYTHON)" ]; then \
	  echo "PYTHON=$(PYTHON) is not a Python 3.11 or newer with the module venv:"; \
	  $(PYTHON) -c 'import sys; print("it is Python", sys.version.split()[0]); import venv, ensurepip'; \
	else \
	  echo "No Python 3.11 or newer with the module venv was found as one of: $(PYTHONS)."; \
	fi >&2; \
	echo "Install one (on Debian and Ubuntu with python3-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1
