# make demo | test | research-test | slow-test | lint | docs | testbed | haproxy | page | chaos
# | slow-chaos | dist; each target creates .venv first if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test research-test slow-test lint docs testbed haproxy page chaos slow-chaos dist
.DEFAULT_GOAL := demo

demo: $(VENV)/.complete
	$(BIN)/python examples/demo.py

test: $(VENV)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Of the paper's evaluation, the simulator and the studies in research/.
research-test: $(VENV)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile research/tests

# What the two above leave out because it takes long.
slow-test: $(VENV)/.complete
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests research/tests

lint: $(VENV)/.complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site of docs/, with the API reference, into site/; a warning is an error.
docs: $(VENV)/.docs-complete
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Three hosts on slow links in this machine answer the demo's prompts. Root; may install sshd.
testbed: $(VENV)/.complete
	$(BIN)/python -m tests.testbed.check --rate 100Mbps

# A server behind HAProxy is killed; may install haproxy, as root.
haproxy: $(VENV)/.complete
	$(BIN)/python -m tests.haproxy.check

# The dashboard in a real browser; may install chromium, as root.
page: $(VENV)/.page-complete
	$(BIN)/python -m tests.page.check

# Processes and servers are lost under load, each kind once; no answer may be lost or changed. Those
# in a migration are in slow-chaos: on busy cores, a placement is computed for a minute first.
CHAOS := engine killed;engine paused;front end killed;server lost;server lost, engine killed;launcher killed
chaos: $(VENV)/.complete
	$(BIN)/python benchmarks/chaos.py --seconds 65 --faults "$(CHAOS)"

# And hosts on slow links. Root; may install sshd and nftables.
slow-chaos: $(VENV)/.complete
	$(BIN)/python benchmarks/chaos.py --testbed 100Mbps --seconds 600

# Wheel and sdist in dist/, tried in empty environments.
dist: $(VENV)/.complete
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt build
	$(BIN)/python -m tests.dist

# The marker is written last: a venv whose installation was interrupted is made again. Packages are
# compiled as they are imported: to compile all of them takes two minutes.
$(VENV)/.complete: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt scikit-build-core
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt --no-build-isolation -e '.[test]'
	$(BIN)/python -m dance_jax.models.native
	touch $@

# What the test of the dashboard needs besides.
$(VENV)/.page-complete: $(VENV)/.complete
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt --no-build-isolation -e '.[page]'
	touch $@

# What the site needs besides.
$(VENV)/.docs-complete: $(VENV)/.complete
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@
