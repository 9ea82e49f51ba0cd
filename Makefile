# make demo and make test work on a fresh machine: they create .venv, install everything and run.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -n 2 --dist loadfile

.PHONY: demo test lint types bench-step clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	touch $@

demo: $(INSTALLED)  ## the whole story: tokenizer, store, pretraining, fine-tuning, evaluation, export, generation
	$(BIN)/spade-t5 demo --out runs/demo

test: $(INSTALLED)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## types
	$(BIN)/mypy

bench-step: $(INSTALLED)  ## training step and span corruption against the peers; writes docs/results
	$(BIN)/spade-t5 bench step --out docs/results
	$(BIN)/spade-t5 bench encoder --out docs/results
	$(BIN)/spade-t5 bench data --out docs/results

clean:  ## removes what was built and trained here
	rm -rf $(VENV) runs build dist *.egg-info
