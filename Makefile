# Every command a contributor needs; .ci/run calls `check` and `test` and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: setup demo test check fix bench coverage docs

setup: $(INSTALLED)  ## make .venv with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@

demo: setup  ## run the main job on real photos with a tiny SDXL family
	$(BIN)/sdxl-distill demo

test: setup  ## run the whole test suite
	$(BIN)/pytest

check: setup  ## format, lint, types, import layers; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: setup  ## format, and repair what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## every benchmark, each a table of ratios
	$(BIN)/python benchmarks/run.py

coverage: setup  ## which lines no test reaches
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

docs: setup  ## regenerate docs/configuration.md and configs/*.schema.json
	$(BIN)/python -m sdxl_distill.config.reference
