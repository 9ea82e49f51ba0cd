# make demo and make test work on a fresh machine: they create .venv, install everything and run.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PYTEST_ARGS ?= -n 2 --dist loadfile

# The oldest Triton that is supported, beside everything else of $(VENV): its compiler differs, so kernels are compiled by both.
TRITON_MIN := .venv-triton-min

.PHONY: demo test test-faults lint types triton-min bench-step bench-kernels clean

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,dev]'
	touch $@

demo: $(INSTALLED)  ## the whole story: tokenizer, store, pretraining, fine-tuning, evaluation, export, generation
	$(BIN)/spade-t5 demo --out runs/demo

test: $(INSTALLED)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-faults: $(INSTALLED)  ## kills and resumes by the hundred; writes docs/results/faults.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults $(PYTEST_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m spade_t5.benchmarks.faults --kills 100 --out docs/results

triton-min: $(TRITON_MIN)/.installed  ## environment with the oldest supported Triton, for the compile tests

$(TRITON_MIN)/.installed: $(INSTALLED)
	$(BIN)/python -m venv $(TRITON_MIN)
	$(TRITON_MIN)/bin/python -m pip install --quiet triton==3.6.0 'numpy<2.4'
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(TRITON_MIN)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/base.pth
	touch $@

lint: $(INSTALLED)  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## types
	$(BIN)/mypy

bench-step: $(INSTALLED)  ## training step and span corruption against the peers; writes docs/results
	$(BIN)/spade-t5 bench step --out docs/results
	$(BIN)/spade-t5 bench encoder --out docs/results
	$(BIN)/spade-t5 bench data --out docs/results

bench-kernels: $(INSTALLED)  ## every op against its peers; writes docs/results
	$(BIN)/spade-t5 bench kernels --out docs/results

clean:  ## removes what was built and trained here
	rm -rf $(VENV) $(TRITON_MIN) runs build dist *.egg-info
