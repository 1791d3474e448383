# The commands to remember. Each sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all unit check audit bench chaos docs clean require-jdk require-python

PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
# Everything we start listens on this machine only.
export SPARK_LOCAL_IP := 127.0.0.1
export SPARK_CONF_DIR := $(CURDIR)/etl/spark_conf
# Some hundred processes import the same files: each would compile them anew where a container forbids to keep that.
unexport PYTHONDONTWRITEBYTECODE

# TorchRec on the CPU, for train.embedding_strategy = "sharded" (docs/embeddings.md). Without --no-deps it would bring
# FBGEMM's CUDA build (500 MB), which the extra [sharded] is for. No wheel for this machine: everything else works.
SHARDED := torchrec fbgemm-gpu-cpu tensordict torchmetrics lightning-utilities pyre-extensions typing-inspect pyvers orjson

# ---- what `make demo` runs on -------------------------------------------------------------------------------
SOURCE ?= simulated
INPUT  ?=
CONFIG ?= jobs/configs/$(if $(filter simulated,$(SOURCE)),demo,$(SOURCE)).toml
WORK   ?= runs/demo$(if $(filter simulated,$(SOURCE)),,-$(SOURCE))
LOGS   ?=
SET    ?=
OVERRIDES  = $(foreach s,$(SET),--set $(s))

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 16
	@echo
	@echo "  make demo SOURCE=kuairand INPUT=DIR      the demo on KuaiRand-Pure's files (also kuaisearch, kuaisar, jdsearch)"
	@echo "  make demo CONFIG=jobs/configs/simulated.toml WORK=runs/demo-static   in a world without needs, twice as large"
	@echo "  make demo LOGS=DIR CONFIG=FILE           the demo on your own logs (docs/tables.md says what they look like)"
	@echo "  make demo COMPARE=1                      the demo beside a logistic regression and the same backbone without USR"
	@echo "  make chaos FAULT=\"worker-killed slow-rank\"   some faults; ADDRESS=http://HOST:8265 WORK=SHARED_DIR: on your cluster"
	@echo "  make demo SET=\"train.num_epochs=2\"       with overrides of the configuration, separated by spaces"

setup: $(VENV)/.ready  ## virtual environment and Delta jars (done once; the other targets call it)

require-python:
	@command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, found $$($(PYTHON) --version 2>&1 || echo none); install it (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }

require-jdk:
	@java=$${JAVA_HOME:+$$JAVA_HOME/bin/}java; \
	major=$$($$java -version 2>&1 | sed -nE 's/.* version "([0-9]+).*/\1/p' | head -1 || true); \
	[ "$${major:-0}" -ge 17 ] || { \
	  echo "error: no JDK 17 or newer found (java says: $${major:-nothing}); Spark needs one: install it (Debian, Ubuntu: apt-get install openjdk-17-jdk-headless; macOS: brew install openjdk@17) or set JAVA_HOME" >&2; exit 2; }

$(VENV)/.ready: constraints.txt setup.cfg pyproject.toml cluster/spark/install_delta_jars.py $(wildcard etl/spark_conf/*) | require-python require-jdk
	@echo "setup: virtual environment in $(VENV) (a few minutes the first time; torch is large)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --constraint constraints.txt --editable '.[etl,train,serve,redis,grpc,docs,dev]' > $(VENV)/pip.log 2>&1 \
	  || { tail -20 $(VENV)/pip.log >&2; echo "error: the packages of constraints.txt could not be installed (all of pip's words: $(VENV)/pip.log)" >&2; exit 2; }
	@$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(SHARDED) >> $(VENV)/pip.log 2>&1 \
	  || echo "setup: no TorchRec for this machine (see $(VENV)/pip.log); only embedding_strategy = \"sharded\" needs it"
	@$(BIN)/python cluster/spark/install_delta_jars.py
	@touch $@
	@echo "setup: done"

demo: setup require-jdk  ## logs -> Delta -> 2-worker training of USR -> evaluation -> report -> service
	@python jobs/demo.py --source $(SOURCE) --config '$(CONFIG)' --work '$(WORK)' \
	  $(if $(COMPARE),--compare) $(if $(INPUT),--input '$(INPUT)') $(if $(LOGS),--logs '$(LOGS)') $(OVERRIDES)

# A process a core for the tests without JVM and Ray (tests/unit/conftest.py shares them out). Then Spark in one process
# and Ray in another, side by side (tests/lanes.py): each alone leaves a third of two cores idle.
UNIT := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests/unit

test: setup require-jdk  ## the tests: those of tests/unit, then Spark and Ray side by side
	@failed=0; python -m pytest $(UNIT) || failed=1; python tests/lanes.py || failed=1; exit $$failed

test-all: setup require-jdk  ## and those marked slow: deeper repetitions of what `make test` shows
	@failed=0; python -m pytest $(UNIT) -m "slow or not slow" || failed=1; python tests/lanes.py -m "slow or not slow" || failed=1; exit $$failed

unit: setup  ## the unit tests alone: half a minute; `make test` has those of parts together as well
	@python -m pytest $(UNIT) -m "not slow and not integration"

check: setup  ## lint, formatting, types, import directions
	@ruff check .
	@ruff format --check .
	@mypy
	@mkdir -p .cache/typed && for folder in usr_ray etl jobs; do ln -sfn ../../$$folder .cache/typed/$$folder; done
	@cd benchmarks && MYPYPATH=../.cache/typed mypy --ignore-missing-imports --explicit-package-bases *.py
	@python -m pytest tests/unit/test_imports.py tests/unit/test_house.py tests/unit/cluster/test_security.py

audit: setup  ## known flaws of the pinned packages (asks PyPI, so it needs the network)
	@[ -x .cache/audit/bin/pip-audit ] || { $(BIN)/python -m venv .cache/audit && .cache/audit/bin/pip install --quiet pip-audit==2.10.1; }
	@.cache/audit/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

bench: setup require-jdk  ## benchmarks: ratios inside one run, written to benchmarks/results
	@for script in benchmarks/*.py; do echo "== $$script"; python $$script; done

chaos: setup require-jdk  ## faults on purpose: kills, torn and full storage, hanging ranks, bad tables; a table of what came of each
	@python -m tests.chaos $(foreach f,$(FAULT),--fault $(f)) $(if $(ADDRESS),--address $(ADDRESS)) \
	  $(if $(filter command line environment,$(origin WORK)),--work '$(WORK)')

docs: setup  ## the documentation as HTML: guides, and the API reference from the docstrings, in build/docs
	@python docs/site/build.py

clean:  ## remove runs and caches (not the virtual environment)
	rm -rf runs .cache build spark-warehouse .pytest_cache .mypy_cache .ruff_cache
