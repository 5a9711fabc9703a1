# make setup         creates .venv with pinned versions. Needs Python 3.10 to 3.14 and a network.
# make demo          sets up, then pretrains on the embedded digits: minutes on two CPU cores.
# make test          sets up, then runs the tests. MOCOFAST_DATA=DIR names a folder of real images.
# make check         checks format, lint and types, and runs the tests, as CI does.
# make docs          builds the documentation site in site/, which opens without a network.
# make dist          builds sdist and wheel in dist/, and checks both for an index (docs/release.md).
# make test-newest   runs the tests with the newest versions of all packages, in .venv-newest.
# make drills        kills and spoils runs for an hour, and prints what they survived.
# make audit         compares the installed packages with known weaknesses, by pip-audit.
# EXTRAS=cuda12,dev make setup    sets up for a driver of CUDA 12, in a clone without .venv.
# make setup CPU=1   sets up the commands alone, with a CPU build of PyTorch: 1.4 GB.
#                    Without a CPU build of torchvision at pip's index: what the demo needs.

ifdef CPU
EXTRAS ?= train
else
EXTRAS ?= cuda13,dev
endif
# Takes the first Python that can make a virtual environment. `ensurepip` installs pip there, and
# Debian ships `ensurepip` in a package of its own.
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.10 python3.14; do \
	$$p -c 'import ensurepip, sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' \
		2>/dev/null && echo $$p && break; done)
# Two test processes with one thread each (OMP_NUM_THREADS=1 below). With more threads the
# processes wait for one another, which takes minutes on a busy machine.
PYTEST_ARGS ?= -n 2
BIN := .venv/bin
READY := .venv/ready

.PHONY: setup demo test test-newest docs dist drills audit lint check format

setup: $(READY)

$(READY): setup.py pyproject.toml constraints.txt $(wildcard mocofast/data/*.[ch] kernels/*/*.[ch])
	@test -n "$(PYTHON)" || { echo "No Python 3.10 to 3.14 with venv on PATH" \
		"(Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Setting up .venv with $$($(PYTHON) --version): $(if $(CPU),A CPU build of PyTorch and" \
		"the commands are about 1.4 GB.,All packages with those of the tests are about 7 GB.)" \
		"This takes minutes."
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
ifdef CPU
	@# The newest CPU builds that pip finds. On macOS all builds are for CPUs.
	@build() { $(BIN)/python -m pip index versions $$1 2>/dev/null \
		| grep -o '[0-9.]*+cpu' | head -n 1 | sed "s/^/$$1==/"; }; \
	torch=$$(build torch); vision=$$(build torchvision); extras=$(EXTRAS); \
	index="PyTorch's own index has these builds:"; \
	index="$$index rm -f $@; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"; \
	index="$$index make setup CPU=1"; \
	test "$$(uname)" = Darwin -o -n "$$torch" || { \
		echo "No CPU build of torch (a version with +cpu) at pip's index. $$index. The build with" \
		"CUDA runs on CPUs, too, and takes about 5 GB: make setup EXTRAS=train"; exit 1; }; \
	test "$$(uname)" = Darwin -o -n "$$vision" || { extras=demo; \
		echo "No CPU build of torchvision (a version with +cpu) at pip's index, so the demo runs," \
		"and photos do not. $$index"; }; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		$$torch $$vision -e ".[$$extras]"
	$(BIN)/python -c "import mocofast.train.run"
else
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[$(EXTRAS)]'
endif
	@touch $@

demo: $(READY)
	$(BIN)/mocofast pretrain

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet -e '.[$(EXTRAS)]'
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(PYTEST_ARGS)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html"

dist:
	test -x .venv-dist/bin/twine || { $(PYTHON) -m venv --clear .venv-dist \
		&& .venv-dist/bin/python -m pip install --quiet build twine; }
	rm -rf dist build
	.venv-dist/bin/python -m build --outdir dist .
	.venv-dist/bin/twine check --strict dist/*

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

check: lint test

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains hundreds of short runs that meet a fault, and prints what they survived. An hour.
drills: $(READY)
	$(BIN)/python -m tests.drills.kills --count 100
	$(BIN)/python -m tests.drills.kills --count 50 --ranks 2
	$(BIN)/python -m tests.drills.ranks
	$(BIN)/python -m tests.drills.elastic
	$(BIN)/python -m tests.drills.files
	$(BIN)/python -m tests.drills.endurance
	$(BIN)/python -m tests.drills.images --minutes 10
	$(BIN)/python -m tests.drills.inputs --minutes 10
	$(BIN)/python -m tests.drills.shards --minutes 5
	$(BIN)/python -m tests.drills.http --minutes 5

audit: $(READY)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --path $(wildcard .venv/lib/python3*/site-packages)
