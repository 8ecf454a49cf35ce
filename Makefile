# Every command a contributor needs; .ci/run calls `check`, `test`, `test-lowest` and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
# Two at once: tests of many processes are processes of their own.
TEST_PROCESSES ?= 2
LOWEST_INSTALLED := $(LOWEST)/.installed
# What depends most on libraries: networks, files, text, a tiny build and a tiny training.
LOWEST_TESTS := tests/config/test_loader.py tests/config/test_builder.py tests/config/test_distill.py \
  tests/core tests/models tests/catalog tests/shards tests/sets/test_teacher.py \
  tests/stream/test_join.py tests/train/test_session.py tests/train/test_checkpoint.py \
  tests/export/test_student.py tests/export/test_use.py

.PHONY: setup demo test test-lowest test-processors check fix bench coverage mutants house docs

setup: $(INSTALLED)  ## make .venv with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[demo,dev]'
	@touch $@

$(LOWEST): $(LOWEST_INSTALLED)  ## make an environment with the lowest versions that are allowed

$(LOWEST_INSTALLED): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet -c constraints-lowest.txt \
	  -e . hypothesis pytest pytest-timeout tokenizers
	@touch $@

demo: setup  ## run the main job on real photos with a tiny SDXL family
	$(BIN)/sdxl-distill demo

test: setup $(LOWEST_INSTALLED)  ## run the whole test suite; one test asks the other environment
	$(BIN)/pytest --numprocesses $(TEST_PROCESSES) --dist worksteal

test-lowest: $(LOWEST_INSTALLED)  ## run a part of the suite with the lowest versions
	$(LOWEST)/bin/python -m pytest -m "not slow" $(LOWEST_TESTS)

test-processors: setup  ## what compares floats, under other instruction sets and thread counts
	$(BIN)/python tests/support/processors.py

check: setup  ## format, lint, rules of the house, types, import layers; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/python tests/house/rules.py
	$(BIN)/pyright
	$(BIN)/lint-imports

fix: setup  ## format, and repair what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## every benchmark, each a table of ratios
	$(BIN)/python benchmarks/run.py

coverage: setup $(LOWEST_INSTALLED)  ## which lines no test reaches
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

MODULE ?= $(addprefix sdxl_distill/,core order storage shards builder)
mutants: setup  ## which broken lines the tests find; MODULE=FILE or FOLDER, SAMPLE=NUMBER for fewer
	OMP_NUM_THREADS=1 $(BIN)/python tests/house/mutants.py $(MODULE) $(if $(SAMPLE),--sample $(SAMPLE))

house: setup  ## figures of the package's own text
	$(BIN)/python tests/house/figures.py

docs: setup  ## regenerate docs/configuration.md and configs/*.schema.json
	$(BIN)/python -m sdxl_distill.config.reference
