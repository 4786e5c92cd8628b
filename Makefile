# `make setup` once (every other target does it for you), then `make demo`, `make test`, `make lint`.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

# The constraints hold for the build backend too, which pip installs into an environment of its own.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo test fuzz torch-oldest stack lint exact parity parity-torch flow-peers bench bench-quick docs package clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	touch $@

demo: setup
	$(BIN)/python -m invfunc demo

test: setup
	$(BIN)/python -m pytest -n auto

# Random programs, lowered against plain autograd: `make fuzz FUZZ=1000`; one of them by `python -m tests.fuzz --seed 7`.
FUZZ ?= 10000

fuzz: setup
	$(BIN)/python -m tests.fuzz --count $(FUZZ)

# The suite on the oldest torch that pyproject.toml admits: a CUDA build, several GB. What it requires may be older than
# what constraints.txt says, so that the constraints hold for the rest alone. TESTS="tests/test_laws.py ..." runs a part.
OLDEST := 2.13.0
OLD := build/torch-oldest
TESTS ?=

torch-oldest: $(OLD)/.stamp
	$(OLD)/bin/python -m pytest -n auto $(TESTS)

$(OLD)/.stamp: Makefile pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLD)
	grep -viE '^(torch|setuptools|cuda-|nvidia-)' constraints.txt > $(OLD)/constraints.txt
	PIP_CONSTRAINT=$(OLD)/constraints.txt $(OLD)/bin/python -m pip install --quiet torch==$(OLDEST) -e '.[demo,dev,docs]'
	touch $@

# Models, trainers and flows of other packages, which tests/stack holds to what they do without us.
STACK := build/stack

stack: $(STACK)/.stamp
	$(STACK)/bin/python -m pytest tests/stack

$(STACK)/.stamp: Makefile pyproject.toml tests/stack/requirements.txt
	$(PYTHON) -m venv $(STACK)
	PIP_CONSTRAINT= $(STACK)/bin/python -m pip install --quiet -r tests/stack/requirements.txt -e .
	touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# The bit-exact bars at full depth.
exact: setup
	$(BIN)/python -m pytest -m exact tests/test_exact.py

# The tests that ship with MemCNN, and the U-Nets of a package that is built on it, against our modules of its names.
parity: setup
	$(BIN)/python tests/parity/run.py

# Torch's own tests of its checkpoint, against ours, from the folder test of a copy of its repository.
TORCH_TESTS ?=
parity-torch: setup
	$(BIN)/python tests/parity/run_torch.py "$(TORCH_TESTS)"

# Our flows against those of zuko and normflows with the same parameters. `make test` skips these where they are absent.
flow-peers: setup build/peers
	PYTHONPATH=build/peers $(BIN)/python -m pytest tests/peers

# Every engine that frees activations, in one table and three plots, and how our cost grows: in benchmarks/results.
PEERS := build/peers
BENCH := PYTHONPATH=$(PEERS) $(BIN)/python -m

bench: setup $(PEERS)
	$(BENCH) benchmarks.table full
	$(BENCH) benchmarks.scaling
	$(BENCH) benchmarks.overhead
	$(BENCH) benchmarks.compiling

bench-quick: setup $(PEERS)
	$(BENCH) benchmarks.table quick

# What the peers require pulls in other builds of torch, so that they come alone. Without them their rows say so.
$(PEERS): benchmarks/peers.txt
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ -r $<
	touch $@

# The site, in build/site. The variable silences what mkdocs-material says about the next major version of MkDocs.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What would be published: built, checked, and tested where it is installed with torch alone.
package: setup
	rm -rf build/package
	$(BIN)/python -m build --outdir build/package .
	$(BIN)/twine check --strict build/package/*
	$(BIN)/python tests/alone.py build/package/*.whl build/package/alone

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
