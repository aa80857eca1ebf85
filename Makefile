# The whole contract of a developer with this project. `make` prints it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Every process of the tests reads compiled files instead of compiling for itself, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=
WORKERS ?= 2
TOGETHER := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone"
ALONE := $(BIN)/python -m pytest -m alone

.PHONY: help demo test test-all test-rest test-rest-together install lint type format hooks bench
help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

install: $(STAMP)  ## make .venv and install everything, as pinned in constraints.txt
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || (command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV))
	@echo "installing into $(VENV) (about two minutes, 2 GB)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=77"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

demo: install  ## split the shipped model over an edge and a cloud actor and chat with it
	@$(BIN)/splitray demo

test: install lint type  ## lint, types and the tests, the great sets thinned
	@$(TOGETHER) --part quick
	@$(ALONE) --part quick

test-all: install lint type  ## lint, types and every test
	@$(TOGETHER)
	@$(ALONE)

test-rest: test-rest-together  ## what `make test` leaves out of `make test-all`
	@$(ALONE) --part rest

test-rest-together: install
	@$(TOGETHER) --part rest $(OPTIONS)

lint: install  ## ruff
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .

type: install  ## mypy
	@$(BIN)/mypy

format: install  ## rewrite the code in the house format
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .
	@$(BIN)/python tests/packaging/file_lists.py

hooks: install  ## check with ruff and mypy before every commit
	@$(BIN)/pre-commit install

bench: install  ## the engine against one-thread transformers (idle machine, about six minutes)
	@$(BIN)/splitray bench
