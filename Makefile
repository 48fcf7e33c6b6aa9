# Everything starts from a fresh clone with Python >= 3.11, git and make: each target makes .venv itself and installs
# into it what it needs, again only when pyproject.toml has changed.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --no-compile
SOURCES := deepeprop_jax tests experiments configs docs/conf.py

# One thread for each test worker: two workers on two cores otherwise wait for each other's threads.
ONE_THREAD := JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 NPROC=1
XLA := --xla_cpu_multi_thread_eigen=false --xla_cpu_parallel_codegen_split_count=1
# XLA's older code generator compiles in half the time. Asked for where it is known to be there: XLA stops at a flag that
# it does not know.
OLD_EMITTERS = $(shell $(RUN) -c "import jax; print('--xla_cpu_use_fusion_emitters=false' * (jax.__version_info__ < (0, 11)))")
AS_USERS := $(ONE_THREAD) XLA_FLAGS="$(XLA)" $(RUN) -m pytest -n $(WORKERS) --dist worksteal
QUICKLY = $(ONE_THREAD) XLA_FLAGS="$(XLA) $(OLD_EMITTERS)" $(RUN) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help demo test newest slow sweep lint format docs figures bench experiments rl report types dist wheel clean

help:
	@echo 'make demo     train a 2-layer GRU online on handwritten digits, every rule side by side (3 minutes)'
	@echo 'make test     lint, types, tests, docstring examples, README code'
	@echo 'make newest   the same with the newest JAX, in an environment of its own (python3.13, or PYTHON=...)'
	@echo 'make slow     the tests that take minutes, and those that are like others'
	@echo 'make sweep    segments of every length and mode against the lattice, over the whole zoo (an hour)'
	@echo 'make format   rewrite the sources in the house style'
	@echo 'make docs     the documentation site, its notebooks run: build/site/index.html (5 minutes)'
	@echo 'make figures  the demo's tables and the pictures of the README again'
	@echo 'make bench    time, memory and gradient error against BPTT and other rivals (SUITE=acceptance: 20 minutes)'
	@echo 'make experiments  what docs/experiments.md reports, all of it or SWEEP=name; goes on where it was stopped'
	@echo 'make rl       streaming actor-critic, every rule on every task or on TASK=name; goes on with the rule that was stopped'
	@echo 'make report   the tables of its logs and its pictures from the stored results'
	@echo 'make types    the code of the pages under mypy and pyright, and every public name with a type'
	@echo 'make dist     build sdist and wheel into dist/ (make wheel: the same)'
	@echo 'make clean    remove .venv and everything generated'

$(VENV)/made:
	@command -v $(PYTHON) >/dev/null || { echo "error: no '$(PYTHON)' found; needed: Python >= 3.11. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1); needed: Python >= 3.11. Try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { \
	    echo "error: $(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/demo: pyproject.toml $(VENV)/made
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/test: pyproject.toml $(VENV)/made
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/demo

$(VENV)/docs: pyproject.toml $(VENV)/made
	$(PIP) --editable '.[docs]'
	@touch $@ $(VENV)/demo

demo: $(VENV)/demo
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.demo

lint: $(VENV)/test
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy

test: lint
	$(QUICKLY) -m 'not as_users and not slow and not sweep'
	$(AS_USERS) -m 'as_users and not slow and not sweep'

# JAX from 0.11 on needs Python 3.12, so Python 3.11 tests JAX 0.10. The environment is made anew each time, and so new.
NEWEST := $(if $(filter command line,$(origin PYTHON)),$(PYTHON),python3.13)
newest:
	@rm -f .venv-newest/made
	@$(MAKE) --no-print-directory test VENV=.venv-newest PYTHON=$(NEWEST)

slow: $(VENV)/test
	$(QUICKLY) -m 'slow and not as_users'
	$(AS_USERS) -m 'slow and as_users'

sweep: $(VENV)/test
	$(QUICKLY) -m sweep

format: $(VENV)/test
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

# Built anew each time, as what a page shows is what its code has just printed.
docs: $(VENV)/docs
	JAX_PLATFORMS=cpu $(RUN) -m sphinx -W --keep-going -E -a -q -j $(WORKERS) -d build/site-parsed docs build/site
	@echo 'build/site/index.html'

figures: $(VENV)/demo
	$(RUN) -m experiments.demo.draw_lattice
	JAX_PLATFORMS=cpu $(RUN) -m experiments.tasks.pictures
	JAX_PLATFORMS=cpu $(RUN) -m experiments.demo --out docs
	$(RUN) -m experiments.demo.readme

SUITE := acceptance
bench: $(VENV)/demo
	@$(RUN) -m experiments.benchmarks --suite $(SUITE)

SWEEP := all
experiments: $(VENV)/test
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.sweeps $(SWEEP)
ifeq ($(SWEEP),all)
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.studies.ablation
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.studies.fidelity_untrained
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.studies.fidelity_trained
	@JAX_PLATFORMS=cpu $(RUN) -m experiments.studies.meter
endif

TASK := all
rl: $(VENV)/demo
	@JAX_PLATFORMS=cpu XLA_FLAGS="--xla_cpu_multi_thread_eigen=false" $(RUN) -m experiments.rl $(TASK)
	@$(RUN) -m experiments.rl.report

report: $(VENV)/test
	@$(RUN) -m experiments.sweeps.report
	@$(RUN) -m experiments.studies.cosine
	@$(RUN) -m experiments.studies.rates
	@$(RUN) -m experiments.studies.ablation --report
	@$(RUN) -m experiments.studies.fidelity_untrained --report
	@$(RUN) -m experiments.studies.fidelity_trained --report
	@$(RUN) -m experiments.studies.meter --report
	@$(RUN) -m experiments.rl.report
	@$(RUN) -m experiments.studies.directions

types: $(VENV)/test
	$(PIP) --editable '.[types]'
	$(AS_USERS) -n 0 -m slow tests/test_types.py

dist: $(VENV)/test
	rm -rf dist
	$(RUN) -m build --no-isolation

wheel: dist

clean:
	rm -rf $(VENV) .venv-newest build dist results .pytest_cache .mypy_cache .ruff_cache *.egg-info
