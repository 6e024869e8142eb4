# A fresh clone on a fresh machine needs `make run` or `make test`, and nothing before it.

# Tried in this order; the first that will do makes .venv.
PYTHON ?= python3.13 python3.12 python3.11 python3
VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run kafka test check format docs docs-pictures bench baseline fuzz soak endurance service clean

help: ## Show this
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

setup: .venv/.ready ## Install what is missing, and make .venv with everything in it

run: setup ## Print every exec on this machine as a JSON line, until Ctrl-C (needs root)
	@$(VENV)/python -m ebpfstream execve --format json

HOST ?= 127.0.0.1
PORT ?= 9092
PARTITIONS ?= 3

kafka: .venv/.kafka ## Start an Apache Kafka to try things with, at HOST=127.0.0.1, PORT=9092, until Ctrl-C
	@$(VENV)/python -m tests.kafka.broker --host $(HOST) --port $(PORT) --partitions $(PARTITIONS)

test: check .venv/.all ## Run the checks and every test; a skipped test is a failure (needs root)
	@$(VENV)/python -m pytest --no-skips

check: setup ## Lint, formatting, types
	@$(VENV)/ruff check
	@$(VENV)/ruff format --check
	@$(VENV)/mypy

format: setup ## Rewrite the sources as `make check` wants them, where that can be done by machine
	@$(VENV)/ruff check --fix
	@$(VENV)/ruff format

# The variable keeps the theme's news to itself.  Not --quiet: warnings that are not said do not count for --strict.
docs: .venv/.docs ## Build the documentation into build/site; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict

docs-pictures: .venv/.docs ## Make the documentation's pictures anew, from what the commands show (needs root)
	@$(VENV)/python docs/pictures/record.py

ROUNDS ?= 3
BENCHMARKS := peers buffers kafka loop spool event_forms syscall_tax
ONLY ?= $(BENCHMARKS)

# Peers that cannot be installed are left out, and told, when it comes to them.
bench: setup ## Every benchmark, or ONLY=peers, in ROUNDS=3, half an hour; see build/bench/summary.md (needs root)
	-@$(MAKE) --no-print-directory --keep-going .venv/.ready $(patsubst %,.venv/.%,$(filter peers kafka,$(ONLY)))
	@$(VENV)/python benchmarks/all.py --rounds $(ROUNDS) --only $(ONLY)

baseline: .venv/.guard ## Count the instructions of the hot paths anew, and keep that as what tests compare with
	@$(VENV)/python benchmarks/guard.py --update

SECONDS ?= 300

fuzz: setup ## Give arbitrary bytes to everything that reads what the kernel wrote, for SECONDS=300
	@$(VENV)/python -m fuzz --seconds $(SECONDS)

MINUTES ?= 60

soak: setup ## Run a mixed load for MINUTES=60, check every ledger, and report (needs root)
	@$(VENV)/python benchmarks/soak.py --minutes $(MINUTES)

endurance: setup ## Read 100,000 events a second for MINUTES=60: is the ledger exact, memory flat? (needs root)
	@mkdir -p build/bench
	@$(VENV)/python benchmarks/endurance.py --minutes $(MINUTES) --json build/bench/endurance.json

service: .venv/.kafka ## Run the service for MINUTES=60, its broker and itself killed: is anything lost? (needs root)
	@mkdir -p build/bench
	@$(VENV)/python benchmarks/service.py --minutes $(MINUTES) --json build/bench/service.json

clean: ## Remove everything that was made here
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
	@find ebpfstream sinks tests benchmarks fuzz -name __pycache__ -prune -exec rm -rf {} +

# What only some need, and nobody who runs this: a kernel to emulate a machine with, Java, other systems, valgrind, what
# builds the documentation.
.venv/.machines .venv/.peers .venv/.guard .venv/.docs: .ci/setup | setup
	@WITH="$(@:.venv/.%=%)" PYTHON="$(PYTHON)" sh .ci/setup
	@touch $@

.venv/.kafka: .ci/setup tests/kafka/pom.xml | setup
	@WITH=kafka PYTHON="$(PYTHON)" sh .ci/setup
	@$(VENV)/python -m tests.kafka.jars
	@touch $@

# All of it in one go.
.venv/.all: .ci/setup tests/kafka/pom.xml tests/kafka/analysis/pom.xml | setup
	@WITH="machines kafka peers guard docs analysis" PYTHON="$(PYTHON)" sh .ci/setup
	@$(VENV)/python -m tests.kafka.jars
	@$(VENV)/python -m tests.kafka.analysis.flink
	@touch .venv/.machines .venv/.kafka .venv/.peers .venv/.guard .venv/.docs $@

.venv/.ready: pyproject.toml .ci/setup
	@PYTHON="$(PYTHON)" sh .ci/setup
	@touch $@
