# `make train` and `make test` need nothing but make and a Python 3.11 to 3.14 on PATH; or uv, which
# brings a Python where none fits and installs three times as fast.
# ARGS is handed on: make train ARGS="trainer.max_epochs=1", make test ARGS="-k resume".

SHELL := /bin/sh
comma := ,
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV ?= $(shell command -v uv)
CANDIDATES := $(PYTHON) python3.14 python3.13 python3.12 python3.11 python3 python
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
# Workers share the cores out: with threads of their own they would wait for one another. Each takes
# its half in order, as fixtures that start processes like it, and at the end some of the other's.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal
# Compiled, as pip does by itself: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each
# start would compile all that it imports again, and take twice as long.
UV_INSTALL = "$(UV)" pip install --compile-bytecode --quiet
PIP_INSTALL = $(if $(UV),$(UV_INSTALL) --python $(BIN)/python,$(BIN)/python -m pip install \
	--disable-pip-version-check --quiet)
PORT ?= 5001
ARGS ?=

.PHONY: help install train test slow floors newest ui check lint audit format bench torture docs clean

help:
	@echo 'make train    set up, then train the MNIST MLP, tracked'
	@echo 'make test     set up, then run all tests but the slow ones'
	@echo 'make slow     the slow tests: a browser, several processes a run, half a minute of waiting'
	@echo 'make floors   the tests with the oldest packages that pyproject.toml allows'
	@echo 'make newest   the tests with the newest packages, pre-releases of Hydra included'
	@echo 'make ui       MLflow UI on 127.0.0.1:$(PORT) over mlruns/ (make ui PORT=8080)'
	@echo 'make check    format, lint, types, tests'
	@echo 'make format   format, and fix what lint can fix'
	@echo 'make audit    known vulnerabilities of the pinned packages (a part of lint)'
	@echo 'make bench    the speed tables'
	@echo 'make torture  kill runs at random instants and compare what comes out'
	@echo 'make docs     the documentation as a website, in docs/_build'
	@echo 'make clean    remove the environment and caches; data and runs stay'

install: $(INSTALLED)

# A stamp, so that only a change of the declared or pinned packages installs again.
# Some commands on PATH are shims that fail: each candidate has to run.
$(INSTALLED): pyproject.toml constraints.txt
	@if $(BIN)/python -c '$(IN_RANGE)' 2>/dev/null; then exit 0; fi; \
	if [ -n "$(UV)" ]; then \
	  echo 'Setting up $(VENV) with uv; the first time takes a minute and 6 GB.'; \
	  exec "$(UV)" venv --quiet --clear --python '$(or $(PYTHON),>=3.11$(comma)<3.15)' $(VENV); \
	fi; \
	for candidate in $(CANDIDATES); do \
	  if "$$candidate" -c 'import ensurepip, venv; $(IN_RANGE)' >/dev/null 2>&1; then \
	    echo "Setting up $(VENV) with $$("$$candidate" --version); the first time takes some minutes and 6 GB."; \
	    exec "$$candidate" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo 'No Python 3.11 to 3.14 with its venv module on PATH.' >&2; \
	echo 'Install one (Debian, Ubuntu: also python3-venv), or name it: make train PYTHON=/path/to/python3.12' >&2; \
	exit 1
	@$(PIP_INSTALL) --constraint constraints.txt --editable '.[sweep,dev]'
	@touch $@

train: $(INSTALLED)
	@$(BIN)/python train.py model=mlp $(ARGS)
	@echo
	@echo 'Look at it:     make ui'
	@echo 'Run your own:   source $(BIN)/activate, then python train.py model=mlp optimizer.lr=0.1'

test: $(INSTALLED)
	@$(PYTEST) $(ARGS)

slow: $(INSTALLED)
	@$(PYTEST) -m slow $(ARGS)

# Both before a release; each makes an environment of its own, 6 GB, which stays until `make clean`.
floors newest: BIN = $(VENV)-$@/bin
floors: PYTHON ?= 3.11
floors: RESOLVE := --resolution lowest-direct
newest: RESOLVE := --upgrade 'hydra-core>=1.4.0.dev0' 'omegaconf>=2.4.0.dev0'
floors newest:
	@[ -n "$(UV)" ] || { echo 'make $@ resolves with uv: https://docs.astral.sh/uv' >&2; exit 1; }
	@"$(UV)" venv --quiet --clear --python '$(or $(PYTHON),>=3.11$(comma)<3.15)' $(VENV)-$@
	@$(UV_INSTALL) --python $(BIN)/python $(RESOLVE) --editable '.[sweep,dev]'
	@$(PYTEST) $(ARGS)

ui: $(INSTALLED)
	@$(BIN)/python scripts/ui.py --port '$(PORT)' $(ARGS)

check: lint test

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	@$(MAKE) --no-print-directory audit

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Only where the database answers: pip-audit takes a package that it cannot look up for a sound one.
KNOWN_HOLE := Jinja2==2.11.2
AUDIT := --strict --no-deps --disable-pip --progress-spinner off --requirement
audit: $(INSTALLED)
	@if [ -n "$(UV)" ]; then set -- "$(UV)" tool run pip-audit; \
	elif $(BIN)/python -m venv $(VENV)-audit && $(VENV)-audit/bin/python -m pip install --quiet pip-audit; then \
	  set -- $(VENV)-audit/bin/pip-audit; \
	else set -- false; fi; \
	if echo '$(KNOWN_HOLE)' | "$$@" $(AUDIT) /dev/stdin 2>&1 | grep -q 'CVE-\|PYSEC-\|GHSA-'; then \
	  "$$@" $(AUDIT) constraints.txt; \
	else echo 'audit skipped: no database of known vulnerabilities answers'; fi

bench: $(INSTALLED)
	@$(BIN)/python scripts/bench.py $(ARGS)

torture: $(INSTALLED)
	@$(BIN)/python -m pytest -s tests/faults/torture.py tests/sweep/torture_populations.py $(ARGS)

# A warning is an error. Nothing is fetched; docs/conf.py writes the pages of the config groups.
docs: $(INSTALLED)
	@$(BIN)/python -c 'import furo, myst_parser, sphinx' 2>/dev/null || \
	$(PIP_INSTALL) --constraint constraints.txt --editable '.[sweep,dev,docs]'
	@$(BIN)/python -m sphinx --quiet --fail-on-warning docs docs/_build
	@echo 'docs/_build/index.html'

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-floors $(VENV)-newest $(VENV)-peers .pytest_cache .ruff_cache .hypothesis test-artifacts docs/_build docs/generated
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf src/*.egg-info
