# Everything here can be done by hand, too: each target is a few plain commands.
#
# On Linux without a GPU, the CPU build of torch spares a download of gigabytes:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# (a plain pip gets the CUDA build there, which also runs on a CPU).

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
# Processes that share the tests; each takes a core, and up to 4 GB of memory.
TEST_WORKERS ?= 2

MODEL := models/SmolLM2-135M-Instruct
# The one place that says which torch: constraints.txt.
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# GPU machines come with a torch of their own: without a venv here, the Python at hand is taken.
PY ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-gpu check format clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo 'Options: TEST_WORKERS=2  PYTHON=python3.12  VENV=.venv  PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'

venv: $(VENV)/.dev ## set up .venv for work on the project

demo: $(VENV)/.demo ## fetch a small model, train it on a CPU, show what changed; again: only show
	$(BIN)/python scripts/demo.py

test: $(VENV)/.test ## run every test this machine can run
	$(BIN)/python scripts/get_demo_model.py $(MODEL)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.test ## kill trainings hundreds of times, and fill their disks; half an hour
	$(BIN)/python scripts/get_demo_model.py $(MODEL)
	$(BIN)/python -m pytest -m slow

test-gpu: ## run the tests that need a CUDA device (PY=python chooses another Python)
	$(PY) -m pytest -m gpu

check: $(VENV)/.dev ## lint, formatting, types, layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## rewrite the source in its one format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv and caches; models/ and runs/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp is the moment an installation succeeded; it is redone only when what it was made from has changed.
# The extras contain one another, as pyproject.toml says.
CONTAINS_test := demo
CONTAINS_dev := test demo
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	@touch $@ $(addprefix $(VENV)/.,$(CONTAINS_$*))

# torch on its own and first, so that everything after it takes the build that is there.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: '$(PYTHON)' is not a Python 3.11 or newer; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) $(TORCH)
	@touch $@
