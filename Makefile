# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or 3.12: environment, packages, run.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
# On a GPU machine: make TORCH=torch==2.11.0 EXTRAS=dev,data,serve,wandb,mlflow,plot,gpu ...
TORCH ?= torch==2.13.0
EXTRAS ?= dev,data,serve,wandb,mlflow,plot
BIN := .venv/bin
TEXT ?= stdlib
DEMO ?= demo
JOBS ?= 2
PYTEST := $(BIN)/pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder

.PHONY: demo test check fuzz kill lint docs clean
demo: .venv/installed
	$(BIN)/megatron-bit demo --text $(TEXT) --out $(DEMO)

test: .venv/installed lint
	$(PYTEST)

check: .venv/installed lint
	$(PYTEST) -q -m "not slow" --durations=0 --durations-min=2 tests/unit

fuzz: .venv/installed
	MBIT_FUZZ_SEED=$${MBIT_FUZZ_SEED:-$$(date +%s)} MBIT_FUZZ_SECONDS=$${MBIT_FUZZ_SECONDS:-3600} MBIT_FUZZ_COLLECT=1 $(BIN)/pytest -s tests/fuzz

kill: .venv/installed
	cd tests && ../$(BIN)/python -W ignore -m kill.campaign --faults $${N:-1000} --seed $${SEED:-$$(date +%s)} --out ../kill

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/installed
	$(BIN)/megatron-bit config > docs/configuration.md

.venv/installed: pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/it" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv demo
