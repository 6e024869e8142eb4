# A fresh clone on a fresh machine needs `make run` or `make test`, and nothing before it.

# Tried in this order; the first that will do makes .venv.
PYTHON ?= python3.13 python3.12 python3.11 python3
VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup run test check format fuzz soak clean

help: ## Show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

setup: .venv/.ready ## Install what is missing, and make .venv with everything in it

run: setup ## Print every exec on this machine as a JSON line, until Ctrl-C (needs root)
	@$(VENV)/python -m ebpfstream execve --format json

test: check .venv/.machines ## Run the checks and every test; a skipped test is a failure (needs root)
	@$(VENV)/python -m pytest --no-skips

check: setup ## Lint, formatting, types
	@$(VENV)/ruff check
	@$(VENV)/ruff format --check
	@$(VENV)/mypy

format: setup ## Rewrite the sources as `make check` wants them, where that can be done by machine
	@$(VENV)/ruff check --fix
	@$(VENV)/ruff format

SECONDS ?= 300

fuzz: setup ## Give arbitrary bytes to everything that reads what the kernel wrote, for SECONDS=300
	@$(VENV)/python -m fuzz --seconds $(SECONDS)

MINUTES ?= 60

soak: setup ## Run a mixed load for MINUTES=60, check every ledger, and report (needs root)
	@$(VENV)/python benchmarks/soak.py --minutes $(MINUTES)

clean: ## Remove everything that was made here
	@rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .fuzz
	@find ebpfstream sinks tests benchmarks fuzz -name __pycache__ -prune -exec rm -rf {} +

# A kernel is nothing to install on a machine that only wants to run this.
.venv/.machines: .ci/setup
	@MACHINES=yes PYTHON="$(PYTHON)" sh .ci/setup
	@touch $@

.venv/.ready: pyproject.toml .ci/setup
	@PYTHON="$(PYTHON)" sh .ci/setup
	@touch $@
