# Two commands for a start: `make quickstart` and `make test`. `make help` lists the others.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV ?= .venv
# Extra arguments for pip. On Linux without a GPU, PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" saves a
# download of some gigabytes.
PIP_ARGS ?=
BIN := $(VENV)/bin
RUN := runs/quickstart

TOKENIZER := --config configs/vqgan/base.yaml --config configs/vqgan/digits.yaml
ARGEN := --config configs/argen/base.yaml --config configs/argen/digits.yaml

# Threads of OpenMP that wait leave their core to other programs, as in llamagen/cores.py; see docs/speed.md.
ifeq ($(OMP_WAIT_POLICY)$(GOMP_SPINCOUNT),)
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 2000
endif

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart benchmark-quickstart digits-accuracy text-to-digits test test-slow lint format types clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

# The stamps hold the installed state, so that a second call costs nothing.
$(BIN)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11 …"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e .
	@touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -e ".[dev]"
	@touch $@

install: $(BIN)/.installed ## make the virtual environment and install the project

install-dev: $(BIN)/.installed-dev ## the same with the tools for tests, lint and types

quickstart: install ## from handwritten digits to new ones: train both models and sample, minutes on a CPU
	rm -rf $(RUN)
	@echo; echo "1/4 train the image tokenizer"
	$(BIN)/python main.py fit $(TOKENIZER)
	@echo; echo "2/4 turn the images into codes"
	$(BIN)/python main.py predict $(TOKENIZER) --config configs/vqgan/extract.yaml --ckpt_path $(RUN)/tokenizer/checkpoints/last.ckpt
	@echo; echo "3/4 train the autoregressive model on the codes"
	$(BIN)/python main.py fit $(ARGEN)
	@echo; echo "4/4 sample new images"
	$(BIN)/python main.py predict $(ARGEN) --config configs/argen/sample.yaml --ckpt_path $(RUN)/argen/checkpoints/last.ckpt
	@echo; echo "Done. Open $(RUN)/samples/grid.png: a row of new images for each digit."
	@echo "What the tokenizer keeps of an image: $$(ls $(RUN)/tokenizer/reconstructions/*.png | tail -1)"

benchmark-quickstart: install ## time and accuracy of the quickstart in an empty clone and environment
	$(BIN)/python benchmarks/quickstart.py

digits-accuracy: install ## how many of the quickstart's digits a classifier recognises
	$(BIN)/python benchmarks/digits_accuracy.py $(RUN)/samples/samples.npz

text-to-digits: install-dev ## from captions of digits to new digits: all stages of text to image, minutes on a CPU
	rm -rf runs/text_digits
	$(BIN)/python -m benchmarks.text_to_digits runs/text_digits

test: install-dev ## the whole CPU test suite, with coverage
	$(BIN)/python -m pytest -n 2 -m "not slow and not gpu and not network" --cov --cov-report=term

test-slow: install-dev ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

lint: install-dev ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install-dev ## let ruff mend what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install-dev ## mypy
	$(BIN)/mypy

clean: ## remove the virtual environment and what tools left behind; runs and data stay
	rm -rf $(VENV) build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache
