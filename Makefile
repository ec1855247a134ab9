# Two commands: `make demo` and `make test`. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
STUDY ?= bundled:smollm2-medical
OUT ?= runs/smollm2-medical
# Where it is set, each start would compile all that it imports anew: 20 s for the models' libraries.
unexport PYTHONDONTWRITEBYTECODE
# Processes that share the tests, of one thread each: on tensors this small a second thread costs more than it gives. On
# two cores a third one works while others wait, for a browser or for processes that they have started.
TEST_JOBS ?= 3
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
ALL = -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder --ignore=tests/test_layers.py
SHARED = $(if $(filter-out 1,$(TEST_JOBS)),-n $(TEST_JOBS))

# How many of the simulations run: 1 for all, 4 for one in four, 4:KEY for others than 4 alone.
SAMPLE ?= 1

.PHONY: demo reduced test ci check lint types doctests compiled unit real browser simulations coverage mutants lowest newest format clean benchmark-env docs

demo: .venv/.installed
	@$(BIN)/saeffect run $(STUDY) --out $(OUT)

# The same with less text, fewer features and fewer doses: every stage on the real models. `make real` runs it too.
reduced: .venv/.installed-test
	@rm -rf runs/reduced
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/reduced_demo.py runs/reduced

# All of the tests that follow but the simulations, in one run: no core waits for the last file of a layer.
test: check
	$(PYTEST) $(ALL) -m "not simulation and not slow" tests

# The same with the simulations, or a sample of them.
ci: check
	$(PYTEST) $(ALL) --sample $(SAMPLE) tests

# mypy keeps one core busy, the rest the other; for `make test`, to compile the tests too, which each of the processes
# that share them would do again.
test ci: ALSO = compiled
check: .venv/.installed-test
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target TEST_JOBS=1 types lint doctests $(ALSO)

lint: .venv/.installed-test
	$(BIN)/ruff check src tests scripts
	$(BIN)/ruff format --check src tests scripts

types: .venv/.installed-test
	$(BIN)/mypy

# And the layers of imports: one start of Python for both.
doctests: .venv/.installed-test
	$(PYTEST) $(SHARED) --doctest-modules src/saeffect tests/test_layers.py

compiled: .venv/.installed-test
	-@$(PYTEST) --collect-only tests >/dev/null

unit: .venv/.installed-test
	$(call run_unit,$(BIN))

run_unit = OMP_NUM_THREADS=1 $(1)/pytest $(ALL) $(UNIT_FLAGS) tests \
	-m "not real and not browser and not simulation and not slow"

# The unit tests with the lowest and with the newest releases that pyproject.toml allows, each in an environment of its
# own (3 to 6 GB), without the packages that tests compare with: these ask for others. PYTHON=python3.13 for another Python.
lowest: RESOLUTION := lowest-direct
newest: RESOLUTION := highest
lowest newest:
	$(PYTHON) -c '$(VERSION)'
	$(PYTHON) -m venv .venv-$@
	.venv-$@/bin/pip install --quiet uv
	.venv-$@/bin/uv pip install --quiet --upgrade --python .venv-$@/bin/python --resolution $(RESOLUTION) --no-build \
		--editable '.[test]'
	$(call run_unit,.venv-$@/bin)

# Only files that have such tests: to collect all would take as long as some of them.
marked = $(shell grep -rlE "mark\.$(1)\b" tests --include="test_*.py")

real: .venv/.installed-test
	$(PYTEST) -m real $(call marked,real)

browser: .venv/.installed-test
	$(PYTEST) -m "browser and not real" $(call marked,browser)

# The error rates and coverages, each over many simulated studies, and other slow tests. `make test` leaves them out.
simulations: .venv/.installed-test
	$(PYTEST) $(SHARED) -m "simulation or slow" --sample $(SAMPLE) $(call marked,(simulation|slow))

# The documentation as a site in build/site; a broken link or an unknown name ends it.
docs: .venv/.installed-test
	$(INSTALL) --editable '.[test,docs]'
	$(BIN)/mkdocs build --strict

# Branch coverage of src/ by the unit layer.
coverage:
	@$(MAKE) --no-print-directory unit UNIT_FLAGS="--cov=saeffect --cov-branch --cov-report=term:skip-covered"

# Small changes to the statistics, one at a time: how many do the tests notice? About an hour.
mutants: .venv/.installed-test
	$(INSTALL) --editable '.[test,mutants]'
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children $(TEST_JOBS)

format: .venv/.installed-test
	$(BIN)/ruff check --fix src tests scripts
	$(BIN)/ruff format src tests scripts

# Other people's trainers, each at its pinned version, in .venv-peers and .venv-dictionary (about 3 GB).
benchmark-env:
	@PYTHON=$(PYTHON) benchmarks/setup_peers.sh

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache

VERSION := import sys; sys.exit(0 if sys.version_info >= (3, 11) else "saeffect needs Python 3.11 or newer; set PYTHON=...")
# Not compiled: Python does that, once, for the few files that are imported.
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt

# The pip that comes with Python 3.11 takes twice as long over the rest; where there is no newer one, it will do.
define venv
	$(PYTHON) -c '$(VERSION)'
	$(PYTHON) -m venv .venv
	-$(INSTALL) --upgrade pip
endef

.venv/.installed: pyproject.toml constraints.txt
	$(venv)
	$(INSTALL) --editable .
	@# Its modules are compiled and the embedded model is fetched, if it can be.
	-@$(BIN)/saeffect check bundled:smollm2-medical >/dev/null
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt
	$(venv)
	$(INSTALL) --editable '.[test,peers]'
	@touch .venv/.installed $@
