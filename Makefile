# Everything runs in an environment of this folder's own; nothing needs to be installed before but Python 3.11.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: install demo check test clean

install: .venv/.installed
demo: install
	@$(BIN)/python -m jobs.launch demo --cluster "$${PIXART_CLUSTER:-local}"

# torch goes first and by exact version: asked for by range, package installers take the newest CUDA build.
.venv/.installed: pyproject.toml
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" "uv>=0.9,<1" 2>/dev/null || \
		$(BIN)/python -m pip install "$(TORCH)" "uv>=0.9,<1"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --editable ".[dev]"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv-torchao --no-deps "torchao>=0.18,<0.19"
	@touch $@

check: .venv/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "not slow and not slurm and not vllm and not gpu"

test: .venv/.installed-dev
	@sh tests/support/vllm_environment.sh .venv-vllm
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest

clean:
	rm -rf .venv .venv-vllm .venv-torchao outputs build *.egg-info
