# The same targets for people and for CI. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

VENV := .venv
RUN := $(VENV)/bin/python
UV := .uv/bin/uv
# Another interpreter: make train PYTHON=/path/to/python3.12
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && command -v $$p && break; done)
DASHBOARD_PORT := 8237
MLFLOW_PORT := 5000
SOURCES := flowsentry steps pipelines materializers stacks docker tests benchmarks run.py

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(VENV)/locked ## Install the locked environment into .venv (again only if the lock changed)

# Made last, so that an installation that was interrupted is done again.
$(VENV)/locked: requirements/dev.txt $(UV)
	@test -x $(VENV)/bin/python || $(UV) venv --quiet --python "$$("$(PYTHON)" -c 'import sys; print(sys.executable)')" $(VENV)
	@echo "Installing the locked environment into $(VENV) ..."
	@VIRTUAL_ENV=$(VENV) $(UV) pip sync --quiet --require-hashes --compile-bytecode requirements/dev.txt
	@touch $@

# uv itself is checked by hash too, and lives apart: `pip sync` removes from .venv whatever is not in the lock.
$(UV): requirements/uv.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed, but not found; name one: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@echo "Setting up uv with $(PYTHON) ..."
	@"$(PYTHON)" -m venv --clear .uv
	@.uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

.PHONY: train
train: setup ## Train on simulated flows, on this machine; nothing to configure
	@$(RUN) run.py --pipeline train

.PHONY: test
test: check ## Check the code, then run all tests
	@$(RUN) -m pytest

.PHONY: test-cluster
test-cluster: setup ## Run the tests that need a Kubernetes: KUBECONFIG, TEST_REGISTRY, TEST_HOST
	@test -n "$$KUBECONFIG" -a -n "$$TEST_REGISTRY" -a -n "$$TEST_HOST" || { echo "error: KUBECONFIG, TEST_REGISTRY and TEST_HOST have to be set" >&2; exit 1; }
	@FLOWSENTRY_SITE_CONTEXT=test FLOWSENTRY_SITE_HOST="$$TEST_HOST" FLOWSENTRY_SITE_REGISTRY="$$TEST_REGISTRY" $(RUN) -m stacks.images
	@$(RUN) -m pytest -q -m cluster

.PHONY: check
check: setup ## Lint, formatting, types
	@$(RUN) -m ruff check $(SOURCES)
	@$(RUN) -m ruff format --check $(SOURCES)
	@$(RUN) -m mypy

.PHONY: bench
bench: setup ## Measure every figure that the documentation quotes; one of them: ONLY=kernel
	@for script in benchmarks/$(or $(ONLY),[a-z]*).py; do echo "== $$script"; PYTHONPATH=. $(RUN) $$script; done

.PHONY: dashboard
dashboard: setup ## Serve ZenML's dashboard (runs, artifacts, reports) until Ctrl+C
	@$(RUN) -m stacks.dashboard --port $(DASHBOARD_PORT)

.PHONY: mlflow
mlflow: setup ## Serve MLflow (every candidate: parameters, metrics, model) until Ctrl+C
	@$(RUN) -m stacks.mlflow_ui --port $(MLFLOW_PORT)

.PHONY: cluster-services
cluster-services: setup ## Put ZenML, MLflow, object store and monitoring into the cluster of stacks/site.yaml; OVERLAY=existing for services of your own
	@$(RUN) -m stacks.services --overlay $(or $(OVERLAY),quickstart)

.PHONY: images
images: setup ## Build the images and push them to the site's registry (stacks/site.yaml), unless they are there
	@$(RUN) -m stacks.images

.PHONY: lock
lock: $(UV) ## Resolve pyproject.toml into requirements/ again; packages named in UPGRADE="a b" may move
	@for extra in "runtime" "dev"; do \
		$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
			$$(test $$extra = dev && echo --extra dev) $(addprefix --upgrade-package ,$(UPGRADE)) \
			pyproject.toml -o requirements/$$extra.txt; \
	done
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		-c requirements/runtime.txt requirements/serving.in -o requirements/serving.txt

.PHONY: clean
clean: ## Remove the environment and everything that can be made again
	@rm -rf $(VENV) .uv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
