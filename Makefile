# Each target sets up what it needs in .venv. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint

$(VENV)/.run: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev,hf]'
	touch $@

# Trains a V3-style model on the standard library's source; about 6 minutes.
demo: $(VENV)/.run
	$(BIN)/python -m experiments.pretrain --workdir=runs/demo \
	  --config=experiments/configs/v3_tiny.py

# Everything but the sweeps marked slow.
test: $(VENV)/.test
	$(BIN)/python -m pytest -m 'not slow'

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
