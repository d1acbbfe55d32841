# Every target sets up what it needs: a machine with Python (3.10 or newer) and pip is enough.
# PYTHON=python3.12 chooses the interpreter; PIP_ARGS adds options to every pip install, e.g.
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# for the CPU build of torch on Linux.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
# constraints.txt stays with the last Transformers that the newest PEFT fits.
NEWEST_TRANSFORMERS := 5.24.0
SOURCES := adaptive_longformer adaptive_longformer_command_line.py configuration modeling tests $(wildcard examples benchmarks docs/make)
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
# Two workers on two cores, one thread each. Each starts with one half of the files, so that what the
# tests of a file share is made once.
TEST := $(OFFLINE) OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-oldest test-newest lint format docs docs-data gpu clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/\1|\2/' \
		| while IFS='|' read -r target text; do printf '  %-12s %s\n' "$$target" "$$text"; done

# make_venv FOLDER: also on a Debian without python3-venv, where ensurepip is missing.
define make_venv
	@test -x $(1)/bin/pip || $(PYTHON) -m venv --clear $(1) || { \
		$(PYTHON) -m venv --clear --without-pip $(1) && \
		$(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef

.venv/.installed: pyproject.toml constraints.txt
	$(call make_venv,.venv)
	@echo "Installing into .venv (some minutes the first time)"
	@.venv/bin/pip install -qq $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt
	$(call make_venv,.venv)
	@echo "Installing into .venv (some minutes the first time)"
	@.venv/bin/pip install -qq $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch .venv/.installed $@

# The extra "docs" alone: the API pages are read from the sources, nothing of ours is imported.
DOCS_EXTRA := import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*project["optional-dependencies"]["docs"], sep="\n")
.venv-docs/.installed: pyproject.toml constraints.txt
	$(call make_venv,.venv-docs)
	@$(PYTHON) -c '$(DOCS_EXTRA)' > .venv-docs/requirements.txt
	@.venv-docs/bin/pip install -qq $(PIP_ARGS) -c constraints.txt -r .venv-docs/requirements.txt
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(call make_venv,.venv-oldest)
	@echo "Installing into .venv-oldest (some minutes the first time)"
	@.venv-oldest/bin/pip install -qq --no-compile $(PIP_ARGS) -c constraints-oldest.txt -e . pytest
	@touch $@

quickstart: .venv/.installed  ## Convert, verify, time and fine-tune a small Longformer (minutes, no downloads)
	.venv/bin/adaptive-longformer quickstart

test: lint  ## Lint, types and the tests on the pairwise grid
	$(TEST) .venv/bin/python -m pytest -q -n 2 --dist worksteal -m "not gpu" $(PYTEST_ARGS)

test-all: lint  ## As test, on the full grid (long)
	ADAPTIVE_LONGFORMER_FULL_GRID=1 $(TEST) .venv/bin/python -m pytest -q -n 2 --dist worksteal -m "not gpu" $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed  ## The smoke tests on the oldest supported Transformers
	$(OFFLINE) .venv-oldest/bin/python -m pytest -q tests/smoke $(PYTEST_ARGS)

test-newest: .venv/.installed-dev  ## The same on the newest one, in place of that of constraints.txt
	@test -d .venv-newest/transformers-$(NEWEST_TRANSFORMERS).dist-info || \
		.venv/bin/pip install -qq $(PIP_ARGS) --no-deps --upgrade --target .venv-newest transformers==$(NEWEST_TRANSFORMERS)
	$(OFFLINE) PYTHONPATH=$(CURDIR)/.venv-newest .venv/bin/python -m pytest -q tests/smoke $(PYTEST_ARGS)

lint: .venv/.installed-dev  ## Check style, format and types
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 .venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.installed-dev  ## Format the sources and fix what ruff can fix
	.venv/bin/ruff check --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

docs: .venv-docs/.installed  ## Build the documentation into site/, strictly and offline (Python 3.11)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

docs-data: .venv/.installed-dev  ## Draw pictures, write tables and model cards from benchmarks/results
	.venv/bin/python docs/make/pictures.py
	.venv/bin/python docs/make/tables.py
	.venv/bin/python docs/make/model_cards.py

# With the current Python, which needs torch, transformers, pytest and ninja.
gpu:  ## Test and measure on a GPU, nine minutes at most, into gpu-session/
	$(OFFLINE) PYTHONPATH=. $(PYTHON) benchmarks/gpu_session.py --output gpu-session

clean:  ## Remove the environments, caches and build outputs
	rm -rf .venv .venv-docs .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find adaptive_longformer configuration modeling tests -name __pycache__ -prune -exec rm -rf {} +
