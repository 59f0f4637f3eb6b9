# Every target sets up what it needs: a fresh machine has python3 (3.11 or newer), make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow chaos check lint types bench bench-pipeline bench-sandbox lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gym_bus needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

setup: $(READY) ## create .venv with everything, pinned by requirements.lock

RUNS ?= runs
DEMO := benchmarks/gym_bus/benchmarks
demo: $(READY) ## run two benchmarks' example rows through the whole system, with recorded answers
	$(BIN)/gym-bus eval run gsm8k --split example --num-repeats 4 \
		--replay $(DEMO)/gsm8k/data/example_replay.jsonl --output $(RUNS)/demo-gsm8k
	$(BIN)/gym-bus eval run humaneval --split example --num-repeats 4 \
		--replay $(DEMO)/humaneval/data/example_replay.jsonl --output $(RUNS)/demo-humaneval

TESTS ?= tests benchmarks
test: $(READY) ## run the tests: real broker, real Ray, real sandbox, real HTTP
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" \
		--cov=gym_bus.verifiers --cov=gym_bus.benchmarks --cov-report= $(TESTS)
	$(BIN)/python -m coverage report --skip-covered --fail-under=95 \
		--include='verifiers/*,benchmarks/*' --omit='*/tests/*'

test-slow: $(READY) ## run the tests that take long: whole tutorials, the longer runs that are killed; CI does, too
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow $(TESTS)

CHAOS ?= --chaos-rollouts 5000 --chaos-long
chaos: $(READY) ## kill everything at random for minutes, and see that nothing is lost; CHAOS='--chaos-seed 7 ...'
	$(BIN)/python -m pytest -q tests/chaos $(CHAOS)

lint: $(READY) ## formatting, style, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	cd tests && ../$(BIN)/lint-imports --config ../pyproject.toml # beside the folder gym_bus, it would count every module twice

types: $(READY) ## mypy, strict
	$(BIN)/mypy gym_bus/gym_bus workers/gym_bus agents/gym_bus verifiers/gym_bus benchmarks/gym_bus

check: lint types test ## what CI runs

BENCH ?=
bench: bench-pipeline bench-sandbox ## measure the whole pipeline, then the sandbox

bench-pipeline: $(READY) ## rollouts per second, CPU per rollout and memory; BENCH='--latency 2 --concurrency 1024 ...'
	$(BIN)/gym-bus bench $(BENCH)

bench-sandbox: $(READY) ## programs per second, beside a process each and beside a fork without isolation
	$(BIN)/gym-bus sandbox bench

lock: ## pin the newest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-header --no-annotate --no-emit-index-url --upgrade --output-file requirements.lock
	rm -rf $(VENV)-lock

clean: ## remove what the targets made
	rm -rf $(VENV) runs .gym_bus dist .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
