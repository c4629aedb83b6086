# make demo · make test · make bench · make lint · make docs: each sets up its own environment first.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# Tests start processes that import the package again and again: its compiled files are kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-slow test-real bench lint docs format clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/errata demo

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal

test-real: $(STAMP)
	$(BIN)/errata zoo get smollm2-135m
	-$(BIN)/errata zoo get minilm  # where these two cannot be had, the tests that need them are skipped
	-$(BIN)/errata zoo get gemma3-270m
	$(BIN)/python -m pytest -m real --numprocesses auto --dist worksteal

bench: $(STAMP)
	$(BIN)/python benchmarks/rome.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/errata bench examples/bench/atlas-single.yaml

lint: $(STAMP)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build  # not --quiet: it would hide warnings from strict
	@echo "build/site/index.html (with the search: $(PYTHON) -m http.server --directory build/site)"

format: $(STAMP)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
