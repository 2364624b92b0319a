# Every command sets up what it needs: a fresh clone and one of these targets is enough.
VENV ?= .venv
PY := $(VENV)/bin/python
# Tests wait more than they compute, so one process more than there are cores to be sure of. 0: all in one process.
PROCESSES ?= 3
PYTEST := $(PY) -m pytest -q -n $(PROCESSES)
BUF := node_modules/.bin/buf
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo up test test-families check unit protos protos-check lint format types imports compose-env compose-test clean storm fuzz bench-load soak soak-year bench-start bench-edge bench-upload bench-billing bench-pruning bench-watchers bench-train bench-train-gpu

help: ## Show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml constraints.txt scripts/setup
	@VENV=$(VENV) scripts/setup

$(BUF): package.json
	@npm install --silent --no-audit --no-fund --no-package-lock >/dev/null && touch $(BUF)

demo: $(VENV)/.ready ## The whole story on this machine: dataset, quote, tuning, chat, invoice
	@$(VENV)/bin/finemesh demo

up: $(VENV)/.ready ## Start the whole mesh on this machine; Ctrl-C stops it
	@$(VENV)/bin/finemesh up

check: $(VENV)/.ready lint types imports protos-check unit ## Format, lint, types, import contracts, protos, unit tests (about two minutes on two cores)

test: check ## Everything but GPU and compose tests
	@$(PYTEST) -m "not gpu and not compose and not families" --ignore=tests/unit --ignore=tests/architecture tests

test-families: $(VENV)/.ready ## Import, tune, export, serve and ask a tiny model of every family (about an hour on two cores)
	@GRPC_VERBOSITY=ERROR $(PY) -m pytest -q tests/families tests/train/test_families.py

lint:
	@$(VENV)/bin/ruff format --check --quiet . || { $(VENV)/bin/ruff format --diff --quiet .; exit 1; }
	@$(VENV)/bin/ruff check --quiet .

format: $(VENV)/.ready ## Rewrite the code in the house style
	@$(VENV)/bin/ruff format --quiet . && $(VENV)/bin/ruff check --fix --quiet .

types:
	@$(VENV)/bin/mypy --no-error-summary

imports:
	@mkdir -p build
	@$(VENV)/bin/lint-imports --no-cache >build/imports.log 2>&1 || { cat build/imports.log; exit 1; }

unit:
	@$(PYTEST) tests/unit tests/architecture

protos: $(VENV)/.ready ## Generate gen/ from protos/
	@$(PY) scripts/gen_protos.py

protos-check: $(BUF)
	@$(PY) scripts/gen_protos.py --googleapis build/googleapis
	@$(BUF) lint
	@$(BUF) breaking protos --against protos/baseline.binpb
	@$(PY) scripts/gen_protos.py --out build/gen && diff -r -q -x __pycache__ gen/finemesh build/gen/finemesh || { echo "gen/ is not what protos/ gives: run 'make protos'"; exit 1; }

protos-baseline: $(VENV)/.ready $(BUF) ## Accept today's contracts as released: later changes must stay compatible with them
	@$(PY) scripts/gen_protos.py --googleapis build/googleapis && $(BUF) build protos --exclude-source-info -o protos/baseline.binpb

compose-env: ## Make deploy/.env with random secrets, or complete it
	@python3 -m deploy.compose_env

compose-test: $(VENV)/.ready ## The main job through docker compose (needs a Docker Engine)
	@$(PY) -m pytest -q -m compose tests/mesh

storm: $(VENV)/.ready ## Seeded faults over a whole mesh, then a checker: SEED=7, or SEEDS=1-100
	@GRPC_VERBOSITY=ERROR $(PY) -m tests.storm $(or $(SEEDS),$(SEED),1)

fuzz: $(VENV)/.ready ## Arbitrary input for every method, route and parser: EXAMPLES=500 SEED=7
	@seed=$(or $(SEED),$$RANDOM); echo "fuzz: SEED=$$seed EXAMPLES=$(or $(EXAMPLES),500)"; \
	FINEMESH_FUZZ_SEED=$$seed FINEMESH_FUZZ_EXAMPLES=$(or $(EXAMPLES),500) GRPC_VERBOSITY=ERROR \
	$(PY) -m pytest -q --timeout=7200 tests/fuzz

bench-load: $(VENV)/.ready ## A mesh under 200 organizations, 2,000 queued jobs, 500 chats and 1,000 usage events/s: MINUTES=10
	@GRPC_VERBOSITY=ERROR $(PY) -m bench.soak --minutes $(or $(MINUTES),10)

soak: $(VENV)/.ready ## The same for as long as wanted: MINUTES=600
	@GRPC_VERBOSITY=ERROR $(PY) -m bench.soak --minutes $(or $(MINUTES),60)

soak-year: $(VENV)/.ready ## A year of events in virtual time: tables, streams and archive each quarter: MINUTES=15
	@GRPC_VERBOSITY=ERROR $(PY) -m bench.year --minutes $(or $(MINUTES),15)

bench-start: $(VENV)/.ready ## Start of the whole stack beside bare postgres and nats-server
	@$(PY) -m bench.start

bench-edge: $(VENV)/.ready ## GetTuningJob through gateway and scheduler beside a bare grpc.aio echo
	@$(PY) -m bench.edge

bench-upload: $(VENV)/.ready ## An upload of 1 GiB with digest and checks beside cp and sync (about 1 minute, 4 GiB of disk)
	@GRPC_VERBOSITY=ERROR $(PY) -m bench.upload

bench-watchers: $(VENV)/.ready ## An agent's heartbeat beside 1,000 watchers and a full call cap (about 2 minutes)
	@$(PY) -m bench.watchers

bench-pruning: $(VENV)/.ready ## Deleting what is past keeping while 1,000 events a second go out (about 3 minutes)
	@$(PY) -m bench.pruning

bench-billing: $(VENV)/.ready ## Events, transfers, holds and flat cost of billing, each beside its limit (about 8 minutes)
	@$(PY) -m bench.billing

$(VENV)/.bench: $(VENV)/.ready
	@$(PY) -m pip --disable-pip-version-check install -q -c constraints.txt -e '.[bench]' 2> >(grep -v 'is ignored: it is neither a file nor a directory' >&2)
	@touch $(VENV)/.bench

bench-train: $(VENV)/.bench ## The training engine beside TRL and a plain loop: speed, memory and loss (about 22 minutes)
	@$(PY) -m bench.train

bench-train-gpu: $(VENV)/.bench ## The same at the size of Llama-3.1-8B, where a CUDA device is
	@$(PY) -m bench.train.gpu

clean: ## Remove what was built (not the data folder)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache node_modules
