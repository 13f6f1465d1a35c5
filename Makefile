# Two commands to start with: `make quickstart` and `make test`. `make help` lists the others.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV ?= .venv
# Extra arguments for pip. On Linux without a GPU, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# avoids a download of gigabytes; test-all needs it there, unless pip's own index has builds of torch for CPUs.
PIP_ARGS ?=
# Extra arguments for pytest, such as PYTEST_ARGS=--cov or PYTEST_ARGS=--random-order.
PYTEST_ARGS ?=
# Test processes: one more than two cores have, because some tests wait for processes that they start. `worksteal` gives
# each a contiguous part of the tests, so that fixtures of a file are created once.
JOBS ?= 3
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)
RUN := runs/quickstart

TOKENIZER := --config configs/vqgan/base.yaml --config configs/vqgan/digits.yaml
ARGEN := --config configs/argen/base.yaml --config configs/argen/digits.yaml

# Waiting OpenMP threads leave their core to other programs, see llamagen/cores.py and docs/speed.md.
ifeq ($(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT),)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 2000
endif

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart benchmark-quickstart digits-accuracy text-to-digits test test-all vllm-env test-vllm mutations gpu lint format types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

# The stamp files record what is installed, so that a second call does nothing.
$(BIN)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e .
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e ".[dev]"
	@touch $@

install: $(BIN)/.installed ## create the virtual environment and install the project

install-dev: $(BIN)/.installed-dev ## install, with the tools for tests, lint and types

quickstart: install ## train both models on handwritten digits and sample new ones; minutes on a CPU
	rm -rf $(RUN)
	@echo; echo "1/4 train the image tokenizer"
	$(BIN)/python main.py fit $(TOKENIZER)
	@echo; echo "2/4 encode the images as codes"
	$(BIN)/python main.py predict $(TOKENIZER) --config configs/vqgan/extract.yaml \
		--trainer.default_root_dir $(RUN)/codes --ckpt_path $(RUN)/tokenizer/checkpoints/last.ckpt
	@echo; echo "3/4 train the autoregressive model on the codes"
	$(BIN)/python main.py fit $(ARGEN)
	@echo; echo "4/4 sample new images"
	$(BIN)/python main.py predict $(ARGEN) --config configs/argen/sample.yaml \
		--trainer.default_root_dir $(RUN)/samples --ckpt_path $(RUN)/argen/checkpoints/last.ckpt
	@echo; echo "Done. Open $(RUN)/samples/grid.png: one row of new images for each digit."
	@echo "Images and their reconstructions by the tokenizer: $$(ls $(RUN)/tokenizer/reconstructions/*.png | tail -1)"

benchmark-quickstart: install ## time and accuracy of the quickstart in an empty clone and environment
	$(BIN)/python benchmarks/quickstart.py

digits-accuracy: install ## the share of the quickstart's digits that a classifier recognises
	$(BIN)/python benchmarks/digits_accuracy.py $(RUN)/samples/samples.npz

text-to-digits: install-dev ## all stages of text to image on captions of digits; minutes on a CPU
	rm -rf runs/text_digits
	$(BIN)/python -m benchmarks.text_to_digits runs/text_digits

test: install-dev ## the tests, in six minutes
	$(PYTEST) -m "not slow and not gpu"

test-all: install-dev ## the tests with those that take longer: long matrices, a trained text model
	$(PYTEST) -m "not gpu"
	$(MAKE) test-vllm PIP_ARGS="$(PIP_ARGS)"

vllm-env: install-dev ## an environment with vLLM for CPUs, in ~/.cache; once, two minutes and 3 GB
	$(BIN)/python -m tests.vllm_environment $(PIP_ARGS)

test-vllm: install-dev ## the tests of the vLLM engine, in the environment of vllm-env
	python=$$($(BIN)/python -m tests.vllm_environment $(PIP_ARGS)) && \
		PYTHONPATH=. LLAMAGEN_VLLM=1 $$python -m pytest tests/vllm

mutations: install-dev ## break the code in many places, one at a time, and see whether the tests notice
	$(BIN)/python -m tests.mutations --out benchmarks/results/mutations.json

gpu: install-dev ## on a machine with a GPU: its tests, and benchmarks of sampling and training; at most ten minutes
	$(BIN)/python -m benchmarks.gpu

lint: install-dev ## check format and rules with ruff
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install-dev ## format the code and fix lint errors with ruff
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install-dev ## check types with mypy
	$(BIN)/mypy

clean: ## remove the virtual environment and caches of tools; runs and data stay
	rm -rf $(VENV) build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
