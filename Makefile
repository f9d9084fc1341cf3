# Everything is set up on first use, for any Python from 3.11: `make test PYTHON=python3.13`. Each has its own .venv.
PYTHON ?= python3
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo bench test lint clean

help:  ## these lines
	@sed -n 's/^\([a-z]*\):[^#]*## /make \1	/p' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/lab.stamp  ## set up, then train one net per norm on eight devices: jaxnorm compare
	$(BIN)/jaxnorm compare

bench: $(VENV)/bench.stamp  ## set up, then time every norm beside those of other frameworks: jaxnorm bench
	$(BIN)/jaxnorm bench --out benchmarks/results

test: lint  ## set up, then lint, types and every test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/dev.stamp  ## set up, then lint and types
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:  ## remove what make, the tests and the tools made; runs/ stays
	rm -rf .venv* .jax_cache .hypothesis .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp of an extra is newer than pyproject.toml once that extra is installed.
$(VENV)/%.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
