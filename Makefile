# Everything a newcomer runs. Each target makes its own environment on first use; nothing has to be
# installed by hand but Python (3.11 or newer, with pip) and make.
#
#   make demo   make test   make test-all   make lint   make bench   make docs
#
# Variables: PYTHON (interpreter), VENV (environment), OUT (where the demo writes), PYTEST_ARGS,
# ABDUCE_DATA (folder of reference data; tests and benchmarks that need it are skipped without).

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-main test-newest test-all lint bench docs clean

VENV ?= .venv
VENV_NEWEST ?= .venv-newest
OUT ?= demo-output
PYTEST_ARGS ?=

is_supported = -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1

ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.13 python3.12 python; do \
	if $$p $(is_supported); then echo $$p; break; fi; done)
endif

# Python 3.11 has its own set of tested versions: the newest JAX no longer supports it.
CONSTRAINTS = constraints/$(shell $(VENV)/bin/python -c \
	'import sys; print("py311" if sys.version_info < (3, 12) else "newest")').txt

# Workers with one compute thread each are faster here than one process with several: most tests
# spend their time compiling, which XLA does on one thread. An empty WORKERS runs in one process.
WORKERS ?= 2
ifneq ($(WORKERS),)
XDIST = -n $(WORKERS) --dist loadfile
endif

NEWEST_PYTHON = $(shell for p in python3.13 python3.12 \
	$(HOME)/.pyenv/versions/3.13*/bin/python $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	if $$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	echo $$p; break; fi; done)

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3"; \
		exit 1; fi
	@if ! $(PYTHON) $(is_supported); then \
		echo "abduce needs Python 3.11 or newer; $(PYTHON) is `$(PYTHON) --version 2>&1`."; \
		echo "Name another interpreter: make PYTHON=/path/to/python3"; exit 1; fi
	@echo "Making the environment $(VENV) with `$(PYTHON) --version`."
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "Python's venv module is incomplete. On Debian: apt-get install python3-venv"; exit 1; }

# One stamp for each set of packages; a changed pyproject or constraints file installs anew.
$(VENV)/.main: $(VENV)/bin/python pyproject.toml $(wildcard constraints/*.txt)
	@echo "Installing abduce and what it needs (about 700 MB the first time)."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e . -c $(CONSTRAINTS)
	@touch $@

$(VENV)/.%: $(VENV)/.main
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]' -c $(CONSTRAINTS)
	@touch $@

.PRECIOUS: $(VENV)/.%

demo: $(VENV)/.main
	$(VENV)/bin/abduce demo --out $(OUT)

test: test-main test-newest

test-main: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m "not slow" $(XDIST) $(PYTEST_ARGS)

# The language depends on JAX internals, so it is tested on the newest JAX as well.
test-newest:
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then \
		echo "Language tests on the newest JAX: not repeated, $(VENV) has it already."; \
	elif [ -z "$(NEWEST_PYTHON)" ]; then \
		echo "Language tests on the newest JAX: skipped, no Python 3.12 or 3.13 on this machine."; \
	else \
		$(MAKE) --no-print-directory VENV=$(VENV_NEWEST) PYTHON=$(NEWEST_PYTHON) $(VENV_NEWEST)/.dev && \
		echo "Language tests on the newest JAX:" && \
		$(VENV_NEWEST)/bin/python -m pytest tests/ppl -m "not slow" $(XDIST) $(PYTEST_ARGS); \
	fi

test-all: $(VENV)/.dev
	$(VENV)/bin/python -m pytest $(XDIST) $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(VENV)/.bench
	@set -e; for f in `grep -l '^if __name__ == "__main__"' benchmarks/*.py`; do \
		name=`basename $$f .py`; echo "== benchmarks/$$name"; $(VENV)/bin/python -m benchmarks.$$name; done

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --quiet --strict --site-dir site
	@echo "The documentation is in site/index.html."

clean:
	rm -rf $(VENV) $(VENV_NEWEST) site build .pytest_cache .ruff_cache .mypy_cache .hypothesis
