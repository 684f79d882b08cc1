# Each verb sets up .venv by itself, from requirements.lock, the first time and whenever a lock or pyproject.toml changes.
# It needs Python >= 3.11 (with its venv module), make and git; `make test PYTHON=/path/to/python3.12` picks another.

VENV    := .venv
PY      := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
JOBS    ?= 2
ARGS    ?=

PIP     := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install $(if $(wildcard $(PY)),--quiet)
# One thread for each of the JOBS processes: more only makes them wait for one another.
PYTEST  := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
           $(PY) -m pytest -n $(JOBS)

.PHONY: help demo test lint unit slow bench clean distclean
.NOTPARALLEL:

help:
	@echo 'make demo    fine-tune a small real model on real data and show before and after; ARGS="..." goes to it'
	@echo 'make test    lint, unit and slow, in this order'
	@echo 'make lint    ruff, mypy --strict and the import contract'
	@echo 'make unit    the tests that need no real model (under 5 minutes on 2 cores)'
	@echo 'make slow    the tests on real models and beside other libraries'
	@echo 'make bench   every benchmark in its quick form; each ends in one line of JSON'
	@echo 'make clean   remove caches and converted models;  make distclean  remove .venv too'

demo: $(STAMP)
	$(PY) examples/demo.py $(ARGS)

test: lint unit slow

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo

unit: $(STAMP)
	$(PYTEST) -m "not slow" $(ARGS)

slow: $(STAMP)
	$(PYTEST) --dist loadfile -m slow $(ARGS)

bench: $(STAMP)
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(PY) $$script --quick; done

clean:
	rm -rf .deltaw build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# A .venv whose pip works is kept and brought up to date; a half-made one is made anew.
$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@found=; if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHONS); do \
	        if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
	        then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo 'deltaw needs Python >= 3.11 with its venv module; none of these is: $(PYTHONS).' >&2; \
	        echo 'Install one (on Debian: python3 and python3-venv), or name one: make PYTHON=/path/to/python3.12 ...' >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$found: the pinned packages take a few minutes, once."; \
	    $$found -m venv --clear $(VENV); \
	fi
	$(PIP) --no-deps -r requirements.lock
	@# A CUDA build of torch asks for CUDA libraries, which this adds; a CPU build asks for nothing more.
	$(PIP) -c requirements.lock -c requirements-cuda.lock "$$(grep '^torch==' requirements.lock)"
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
