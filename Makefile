# `make lessons` to learn, `make test` to check what you changed. Both set up .venv first, if needed.
PYTHON ?= python3
LAB_ARGS ?=
BIN := .venv/bin
LESSONS := $(wildcard notebooks/[0-9]*.ipynb notebooks/real_*.ipynb) notebooks/gpu.ipynb
SOLUTIONS := $(wildcard notebooks/solutions/*.ipynb)
# What `make test` runs: the first lesson, hangs and what solves their exercises, DDP.
FEW := $(addprefix notebooks/,00_start_here.ipynb 10_hang_clinic.ipynb 11_uneven_work.ipynb solutions/10_hang_clinic.ipynb)
RUN_HERE := $(filter-out notebooks/gpu.ipynb,$(LESSONS)) $(SOLUTIONS)
JOBS ?= 4
ALONE := $(shell grep -rl --include=test_*.py mark.alone tests)
PYTEST := $(BIN)/python -m pytest
# Another worker in place of one that died may wait for ever for its tests.
SPREAD := --dist loadgroup --max-worker-restart=0
NBVAL := -p nbval.plugin -p tests.support.nbval_kernels --nbval --nbval-current-env --nbval-cell-timeout=240 --nbval-sanitize-with=tests/support/nbval_sanitize.cfg -p no:cacheprovider

# Where it is set, each of the hundreds of new Pythons would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help lessons test whole quick check tests together alone nbval nbval-1 nbval-2 nbval-3 nbval-4 binder notebooks gpu newest newest-renew lock pythons docs bench faults healthy stops kills room parity setup tools root

help:
	@echo "make lessons    copy the course to lessons/ once, and open it in JupyterLab (LAB_ARGS=--no-browser on a server)"
	@echo "make test       style, types, all tests but the slow ones, four notebooks (ten minutes on two slow cores; JOBS=8 on more)"
	@echo "make whole      the same with the slow tests and every notebook: must pass before anything lands (an hour there)"
	@echo "make quick      the tests that start no process (less than a minute)"
	@echo "make parity     do launch and plain torch give the same? all features; make test has a sample (some minutes)"
	@echo "make binder     build what Binder builds, and run a lesson in it (downloads everything)"
	@echo "make notebooks  run all notebooks but gpu.ipynb again and store their outputs"
	@echo "make gpu        all that needs a GPU, on a machine that has one (6 minutes; see benchmarks/gpu.sh)"
	@echo "make newest     what a user meets today: the newest versions of everything (20 minutes at most)"
	@echo "make lock       renew binder/constraints.txt, the versions that everything here is tested with (a minute)"
	@echo "make pythons    the same on Python 3.11 with the oldest torch, on 3.12 and on 3.13 (an hour)"
	@echo "make docs       build the web site of the lessons: build/docs/index.html"
	@echo "make bench      time launch() against other launchers, recording, and how soon a hang is named (some minutes)"
	@echo "make faults     break 1,000 runs at random: is each explained? (about 25 minutes)"
	@echo "make healthy    run 500 healthy programs on starved, slow and frozen machines: is one judged hung? (an hour)"
	@echo "make stops      press Stop 1,000 times at random moments: is anything left? (some minutes)"
	@echo "make room       run each lesson as on Binder, on one core: seconds and memory (some minutes)"
	@echo "make kills      kill agents, engines, ranks and kernels at random: is each named, and is anything left? (half an hour)"

setup:
	@$(PYTHON) binder/install.py lessons

# Also installs what tests need; every target but `lessons` depends on it.
tools:
	@$(PYTHON) binder/install.py test

# JupyterLab refuses root without an option: say so before minutes of installing, not after.
root:
	@if [ "$$(id -u)" = 0 ] && [ -z "$(findstring allow-root,$(LAB_ARGS))" ]; then \
		echo "You are root, which JupyterLab takes only if told so: make lessons LAB_ARGS=--allow-root"; exit 2; fi

lessons: root setup
	$(BIN)/ddp-lessons --folder lessons $(LAB_ARGS)

test: tools check
	@$(MAKE) --no-print-directory tests WHICH="and not slow"
	@$(MAKE) --no-print-directory nbval LESSONS="$(FEW)" SOLUTIONS=

whole: tools check tests nbval

check: tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

tests: tools
	@$(MAKE) --no-print-directory together
	@$(MAKE) --no-print-directory alone

# Four at once even on two cores, as tests mostly wait.
together: tools
	$(PYTEST) -n $(JOBS) $(SPREAD) -m "not alone and not binder and not parity $(WHICH)" --durations=10

# One after the other, as each measures what another one would change.
alone: tools
	$(PYTEST) -m "alone $(WHICH)" --durations=10 $(ALONE)

quick: tools
	$(PYTEST) -q -n 2 $(SPREAD) -m "not ranks and not system and not alone and not binder"

parity: tools
	$(PYTEST) -n 2 $(SPREAD) tests/parity

binder: tools
	$(PYTEST) -m binder

# Four notebooks at once, each within the memory that we allow on Binder.
nbval: tools
	@$(MAKE) --no-print-directory -j$(JOBS) nbval-1 nbval-2 nbval-3 nbval-4

nbval-1 nbval-2 nbval-3 nbval-4: tools
	DDP_LESSONS_LIVE=0 $(BIN)/python -m tests.support.confined 1700 $(PYTEST) $(NBVAL) \
		$(shell printf '%s\n' $(LESSONS) $(SOLUTIONS) | awk 'NR % 4 == $(@:nbval-%=%) % 4')

notebooks: tools
	$(BIN)/python -m tests.support.store_outputs $(RUN_HERE)

gpu:
	benchmarks/gpu.sh

newest:
	$(PYTHON) -m tests.support.newest

pythons:
	python3.11 -m tests.support.newest --torch 2.6.0
	python3.12 -m tests.support.newest
	python3.13 -m tests.support.newest

newest-renew:
	$(PYTHON) -m tests.support.newest --renew

lock:
	$(PYTHON) binder/lock.py

docs: tools
	$(BIN)/python -m sphinx -E -W --keep-going -q -n -b html notebooks build/docs
	@echo "open build/docs/index.html"

bench:
	@$(PYTHON) binder/install.py bench
	$(BIN)/python -m benchmarks.launch
	$(BIN)/python -m benchmarks.recording
	$(BIN)/python -m benchmarks.hangs
	$(BIN)/python -m benchmarks.values

kills: tools
	$(BIN)/python -m benchmarks.agents --runs 20
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.launches --runs 500 --kills 200

room: tools
	$(BIN)/python -m benchmarks.binder

healthy: tools
	$(BIN)/python -m benchmarks.healthy --runs 500

stops: tools
	$(BIN)/python -m benchmarks.interrupts --runs 400

faults:
	@$(PYTHON) binder/install.py bench
	$(BIN)/python -m benchmarks.faults --runs 1000
	$(BIN)/python -m benchmarks.compared
