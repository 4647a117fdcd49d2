# make demo | test | research-test | lint | testbed; each target creates .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test research-test lint testbed
.DEFAULT_GOAL := demo

demo: $(VENV)/.complete
	$(BIN)/python examples/demo.py

test: $(VENV)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tests of the paper's evaluation, the simulator and the studies in research/.
research-test: $(VENV)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile research/tests

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Answers the demo's prompts on three hosts with slow links, all inside this machine. Needs root and
# may install sshd.
testbed: $(VENV)/.complete
	$(BIN)/python -m tests.testbed.check --rate 100Mbps

# The marker is written last, so that an interrupted installation is repeated.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m dance_jax.models.native
	touch $@
