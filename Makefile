# `make lessons` to learn, `make test` to check everything. Both set up .venv first, if needed.
PYTHON ?= python3
LAB_ARGS ?=
BIN := .venv/bin
RUN_HERE := $(wildcard notebooks/[0-9]*.ipynb) $(wildcard notebooks/solutions/*.ipynb)
LESSONS := $(RUN_HERE) notebooks/gpu.ipynb
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=120 --nbval-sanitize-with=tests/nbval_sanitize.cfg -p no:cacheprovider

.PHONY: help lessons test check tests nbval notebooks gpu newest newest-renew pythons docs bench faults kills room setup tools root

help:
	@echo "make lessons    open the course in JupyterLab (LAB_ARGS=--no-browser on a server)"
	@echo "make test       check everything: style, types, tests, notebooks"
	@echo "make notebooks  run all notebooks but gpu.ipynb again and store their outputs"
	@echo "make gpu        all that needs a GPU, on a machine that has one (6 minutes; see benchmarks/gpu.sh)"
	@echo "make newest     what a user meets today: the newest versions of everything (20 minutes at most)"
	@echo "make pythons    the same on Python 3.11 with the oldest torch, on 3.12 and on 3.13 (an hour)"
	@echo "make docs       build the web site of the lessons: build/docs/index.html"
	@echo "make bench      time launch() against other launchers, and recording (some minutes)"
	@echo "make faults     break 1,000 runs at random: is each explained? (about 25 minutes)"
	@echo "make room       run each lesson as on Binder, on one core: seconds and memory (some minutes)"
	@echo "make kills      kill agents and engines at random: is each named? (some minutes)"

setup:
	@$(PYTHON) binder/install.py lessons

# What the tests need in addition; the target of everything but the lessons.
tools:
	@$(PYTHON) binder/install.py test

# JupyterLab refuses root unless it is told; better said before minutes of installing than after.
root:
	@if [ "$$(id -u)" = 0 ] && [ -z "$(findstring allow-root,$(LAB_ARGS))" ]; then \
		echo "You are root, which JupyterLab takes only if told so: make lessons LAB_ARGS=--allow-root"; exit 2; fi

lessons: root setup
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks \
		--LabApp.default_url=/lab/tree/00_start_here.ipynb $(LAB_ARGS)

test: tools check tests nbval

check: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: tools
	$(BIN)/python -m pytest --durations=25

nbval: tools
	DDP_LESSONS_LIVE=0 $(BIN)/python -m tests.confined 1500 $(BIN)/python -m pytest $(NBVAL) $(LESSONS)

notebooks: tools
	$(BIN)/python -m tests.store_outputs $(RUN_HERE)

gpu:
	benchmarks/gpu.sh

newest:
	$(PYTHON) -m tests.newest

pythons:
	python3.11 -m tests.newest --torch 2.6.0
	python3.12 -m tests.newest
	python3.13 -m tests.newest

newest-renew:
	$(PYTHON) -m tests.newest --renew

docs: tools
	$(BIN)/python -m sphinx -E -W --keep-going -q -n -b html notebooks build/docs
	@echo "open build/docs/index.html"

bench: tools
	$(BIN)/python -m pip install --quiet -c binder/constraints.txt -e ".[bench]"
	$(BIN)/python -m tests.benchmarks.launch
	$(BIN)/python -m tests.benchmarks.recording

kills: tools
	$(BIN)/python -m tests.benchmarks.agents --runs 20
	$(BIN)/python -m tests.benchmarks.engines

room: tools
	$(BIN)/python -m tests.benchmarks.binder

faults: tools
	$(BIN)/python -m pip install --quiet -c binder/constraints.txt -e ".[bench]"
	$(BIN)/python -m tests.benchmarks.faults --runs 1000
	$(BIN)/python -m tests.benchmarks.compared
