# Each target except help and clean first sets up the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# In a copied or moved folder, .venv still refers to the original folder and its code: remove and recreate it.
ELSEWHERE := $(shell test ! -L $(VENV) && grep -s '^command = ' $(VENV)/pyvenv.cfg | grep -qvF '$(CURDIR)/$(VENV)' && echo remove-venv)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK = 1
export DVC_NO_ANALYTICS = 1
export PREFECT_SERVER_ANALYTICS_ENABLED = false
export MLFLOW_DISABLE_TELEMETRY = true

.DEFAULT_GOAL := help
.PHONY: remove-venv help setup run repro test fast-test long-test lint types bench ui server deploy worker team clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1|/' | column -t -s '|'

setup: $(READY)  ## install everything into .venv, at the versions that were tested together

# uv installs in a fraction of pip's time. Byte-compiling here saves seconds when a package is imported first.
# The link sample:elpv lets DVC watch the sample's file under its name in data.source.
$(READY): pyproject.toml constraints.txt $(ELSEWHERE)
	@$(PYTHON) -c "import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit('unfreeze needs Python 3.11 or 3.12, and $(PYTHON) is %s.%s: make $(MAKECMDGOALS) PYTHON=python3.12' % sys.version_info[:2])"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[dev]'
	ln -sf samples/elpv.yaml sample:elpv
	touch $@

remove-venv:
	rm -rf $(VENV)

run: $(READY)  ## run the recipe as a Prefect flow; RUN="--settings settings/quick.yaml" takes a few minutes
	unfreeze run $(RUN)

repro: $(READY)  ## run the recipe with DVC alone
	dvc repro

# Tests run in the order of the folders: slow tests (tests/integration) start early, fast tests fill the remaining time.
test: $(READY)  ## run all tests except the long ones
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

fast-test: $(READY)  ## run only the fast tests
	pytest -q -n 2 --dist loadfile --ignore tests/integration

long-test: $(READY)  ## run the tests that take minutes: dvc repro, outages, kills, lost workers
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m long

lint: $(READY)  ## check code and formatting with ruff
	ruff check . && ruff format --check .

types: $(READY)  ## check the types
	mypy

bench: $(READY)  ## compare with fastai and with this machine's ceiling; BENCH="--help" lists the options
	uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[bench]'
	python -m benchmarks $(BENCH)

# With HOST=<an address of this machine>, for example 192.168.1.10, other machines can reach the servers without a password: docs/team.md.
# The environment's HOST, which some shells set, is ignored.
HOST = 127.0.0.1

# Serve the database in MLFLOW_TRACKING_URI. If this variable names a server (perhaps this one), serve mlflow.db.
ui: $(READY)  ## open MLflow's pages on the local database: http://127.0.0.1:5000; HOST=<address of this machine> for others
	@python -m pipeline.tracking.local_store
	mlflow server --host $(HOST) --port 5000 --backend-store-uri $(or $(filter-out http%,$(MLFLOW_TRACKING_URI)),sqlite:///mlflow.db)

server: $(READY)  ## start a Prefect server: http://127.0.0.1:4200; HOST=<address of this machine> for others
	prefect server start --host $(HOST)

deploy: $(READY)  ## create the work pool gpu, and deploy the recipe to it; NOTIFY=slack-webhook/team notifies the team through this Prefect block
	prefect work-pool inspect gpu > /dev/null 2>&1 || prefect work-pool create gpu --type process
	python -m flows.deploying
	python -m flows.automations $(if $(NOTIFY),--notify $(NOTIFY))

worker: $(READY)  ## start a worker for the pool gpu, named after this host; as many runs at once as there are GPUs
	prefect worker start --pool gpu --name "$$(uname -n)" --limit "$$(python -m pipeline.process.cards)"

team: $(READY)  ## try a team on this machine: PostgreSQL, S3, Prefect and MLflow with passwords, two workers; TEAM="--help" lists the options
	uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[local-team]'
	@python -m deploy.local_team $(TEAM)

clean:  ## remove the environment and the artifacts; dvc.lock, DVC's cache and MLflow's data stay
	rm -rf $(VENV) artifacts
