# make demo            the whole pipeline on this machine's own Python sources
# make teacher-logits  stage one;  make train-student  stage two
# RECIPE= a recipe's name or file, or a run's folder;  STUDENT= students, or ALL=1;  SET= overrides;  STORE= for inspect and verify
# make plan PILOT= sequences to measure;  BUDGET= bytes a position;  make sweep GRID="a=1,2 b=3,4"
# make export STUDENT= one;  TO= formats;  make evaluate TASKS= files for lm-eval

RECIPE ?= demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COLDSTILL := $(BIN)/coldstill
INSTALLED := $(VENV)/.installed
OPTIONS = $(RECIPE) $(foreach setting,$(SET),--set '$(setting)')
STORE_PATH = $(or $(STORE),runs/$(notdir $(basename $(RECIPE)))/logits)
STUDENTS = $(foreach name,$(STUDENT),--student '$(name)') $(if $(ALL),--all)
GRIDS = $(foreach grid,$(GRID),--grid '$(grid)')

.PHONY: help install demo run init plan train-teacher teacher-logits prune-student train-student evaluate sweep compare report export inspect verify test check bench bench-quality clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,5s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coldstill needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(COLDSTILL) run demo

run train-teacher teacher-logits compare report: $(INSTALLED)
	$(COLDSTILL) $@ $(OPTIONS)

plan: $(INSTALLED)
	$(COLDSTILL) plan $(OPTIONS) $(if $(PILOT),--pilot '$(PILOT)') $(if $(BUDGET),--budget '$(BUDGET)')

prune-student train-student: $(INSTALLED)
	$(COLDSTILL) $@ $(OPTIONS) $(STUDENTS)

evaluate: $(INSTALLED)
	$(COLDSTILL) evaluate $(OPTIONS) $(STUDENTS) $(if $(TASKS),--tasks '$(TASKS)')

sweep: $(INSTALLED)
	$(COLDSTILL) sweep $(OPTIONS) $(GRIDS)

export: $(INSTALLED)
	$(COLDSTILL) export $(OPTIONS) $(STUDENT) $(foreach format,$(TO),--to '$(format)')

init: $(INSTALLED)
	$(COLDSTILL) init $(RECIPE)

inspect: $(INSTALLED)
	$(COLDSTILL) inspect $(STORE_PATH)

verify: $(INSTALLED)
	$(COLDSTILL) store verify $(STORE_PATH)

# The repository is the package, whatever its folder is called; pytest and mypy find it by this link.
.links/coldstill:
	@mkdir -p .links && ln -sfn .. .links/coldstill

test: $(INSTALLED) .links/coldstill
	$(BIN)/python -m pytest --rootdir .links/coldstill -c .links/coldstill/pyproject.toml .links/coldstill/tests

check: $(INSTALLED) .links/coldstill
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p coldstill.data -p coldstill.stages -p coldstill.pipeline
	$(BIN)/mypy --explicit-package-bases tests

bench: $(INSTALLED)
	$(BIN)/python tests/bench/run.py

bench-quality: $(INSTALLED)
	$(BIN)/python tests/bench/quality.py

clean:
	rm -rf $(VENV) .links build *.egg-info
