# `make demo` and `make test` need Python 3.11, make and a C compiler; everything else goes into .venv.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint bench docs clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(BIN)/idlm demo $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/decode.py $(ARGS)

docs: $(STAMP)
	$(BIN)/typer idlm.cli utils docs --name idlm --title 'Command line' --output docs/cli.md

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
