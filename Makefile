# Tercet. `make run` and `make test` are all a newcomer needs; `make help` lists the rest.

PYTHON ?= python3.11
VENV ?= .venv
# Where torch comes from. Linux's default wheel of torch brings CUDA (gigabytes); for the CPU-only one:
#   make run TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu
TORCH_INDEX_URL ?=

BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
TORCH_FROM := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help run test check unit demo-eval docs install clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

run: $(VENV)/.installed ## Start the three services, index the demo corpus, print an answered question
	@exec $(BIN)/tercet up --demo

test: check ## The whole check: lint, types, import rules, tests
	$(BIN)/python -m pytest

check: $(VENV)/.installed-test ## Lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.installed-test ## The tests that need no process of their own
	$(BIN)/python -m pytest tests/unit tests/contract tests/conventions

demo-eval: $(VENV)/.installed ## MRR@10 of the twenty demo questions, by mode
	@exec $(BIN)/tercet demo-eval

docs: $(VENV)/.installed ## Write docs/settings.md from the settings classes
	$(BIN)/python -m tests.conventions.settings_doc

install: $(VENV)/.installed ## Create .venv and install Tercet with pinned dependencies

$(VENV)/bin/python:
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing Tercet's pinned dependencies into $(VENV); the first time this takes a minute or two"
	@$(PIP) install --progress-bar on -q $(TORCH) $(TORCH_FROM) -c constraints.txt
	@$(PIP) install --progress-bar on -q -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "Installing what the tests need"
	@$(PIP) install -q -e '.[test]' -c constraints.txt
	@touch $@

clean: ## Remove the environment, caches and local data
	rm -rf $(VENV) .tercet .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
