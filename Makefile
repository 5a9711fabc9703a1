# make setup   creates .venv with pinned versions (needs Python 3.10 to 3.13 and a network)
# make demo    set-up, then a pretraining on the embedded digits: minutes on two CPU cores
# make test    set-up, then the tests; real images through MOCOFAST_DATA=DIR
# make check   format, lint, types and tests, as CI runs them
# make test-newest                the tests with the newest versions of everything, in a .venv of their own
# EXTRAS=cuda12,dev make setup    for a driver of CUDA 12, in a clone without .venv

EXTRAS ?= cuda13,dev
# The first that runs and can make a virtual environment: Debian packs venv's pip, `ensurepip`, apart.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.10; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
PYTEST_ARGS ?= -n 2
# Two test processes of one thread: threads of several that wait for one another take minutes on a busy machine.
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo test test-newest lint check format

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.13 with venv on PATH (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version): PyTorch and its CUDA libraries are about 6 GB, minutes"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)
	$(BIN)/mocofast pretrain

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
