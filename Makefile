# The commands of this project. They need git, Python 3.11 to 3.13 and make, and set up .venv by themselves.
#   make run         run every notebook, print the comparison        make lab        JupyterLab
#   make test        lint, tests, notebooks compared with their outputs
#   make notebooks   make the committed notebooks from notebooks/src make solutions  the solved exercises
#   make data        fetch real clips, after showing size and terms  make lint  make clean
# `make PYTHON=python3.12 run` takes another Python (after `make clean`).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test lab notebooks solutions data lint clean

help:
	@sed -n '2,6s/^# *//p' Makefile

# Installs again only when the pins or the project's description change.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "Python 3.11, 3.12 or 3.13 is needed, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11"; exit 1; }
	@echo "Installing into $(VENV); this takes about two minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --editable .
	@touch $@

run: $(STAMP)
	@$(BIN)/nlutils run

# Every step runs even after one that failed; the exit code says whether any did.
test: export OMP_NUM_THREADS = 1
test: export OMP_WAIT_POLICY = PASSIVE
test: export TF_CPP_MIN_LOG_LEVEL = 3
test: export PYDEVD_DISABLE_FILE_VALIDATION = 1
test: $(STAMP)
	@failed=""; \
	step() { name="$$1"; shift; echo "== $$name"; "$$@" || failed="$$failed, $$name"; }; \
	step "lint" $(BIN)/ruff check .; \
	step "format" $(BIN)/ruff format --check .; \
	step "tests" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests; \
	step "notebooks" env NLUTILS_CLIPS=procedural NLUTILS_PROFILE=quick $(BIN)/python -m pytest \
	  -n 2 --dist loadfile --nbval --nbval-current-env --nbval-cell-timeout 600 \
	  --nbval-sanitize-with tests/nbval.cfg notebooks/*.ipynb; \
	if [ -n "$$failed" ]; then echo "make test: failed in $${failed#, }"; exit 1; fi; \
	echo "make test: lint, tests and notebooks are right"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks

notebooks: $(STAMP)
	@$(BIN)/nlutils notebooks build

solutions: $(STAMP)
	@$(BIN)/nlutils notebooks solutions

data: $(STAMP)
	@$(BIN)/nlutils data fetch jhmdb21

# The environment, what was made by the commands above, and caches; data sets that were fetched stay.
clean:
	rm -rf $(VENV) build dist data/cache .pytest_cache .ruff_cache
	find nlutils tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
