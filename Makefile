# `make setup` once (every other target does it for you), then `make demo`, `make test`, `make lint`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

# The constraints hold for the build backend too, which pip installs into an environment of its own.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test lint parity clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev]'
	touch $@

demo: setup
	$(BIN)/python -m invfunc

test: setup
	$(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The tests that ship with MemCNN, against our modules of its names.
parity: setup
	$(BIN)/python tests/parity/run.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
