# Everything runs in an environment of this folder's own; nothing needs to be installed before but Python 3.11.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

# The versions of the GPU machine on which benchmarks/gpu_day.py runs, and the newest that are tested.
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
GPU_VERSIONS := torch==2.11.0 transformers==5.17.0 torchao==0.17.0 numpy==2.5.2 safetensors==0.8.0
NEWEST_VERSIONS := torch==2.15.0 transformers==5.24.0 torchao==0.18.0
# Libraries whose checkpoints are read, apart from those of the suite, which behave differently with accelerate.
TRAINERS := accelerate==1.15.0 psutil==7.2.2 ema-pytorch==0.8.3 pytorch-lightning==2.6.6 lightning-utilities==0.15.3 \
	torchmetrics==1.9.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3
FAST := not slow and not slurm and not vllm and not gpu
# Those of Slurm and vLLM start many processes each, and run one after the other behind all others.
WORKERS ?= 2
# Where processes outnumber the processors, a compiler's own workers and threads that wait busily only cost.
test check attack: export TORCHINDUCTOR_COMPILE_THREADS := 1
test check attack: export GOMP_SPINCOUNT := 1000

SPELLED := README.md CONTRIBUTING.md CHANGELOG.md docs benchmarks jobs pixart conversion slurm tests

.PHONY: install demo check docs attack test test-all vllm-env img2dataset-env gpu-env test-gpu-env test-newest gpu-day-rehearsal clean

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
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv-fidelity --no-deps "torch-fidelity>=0.4,<0.5"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --target .venv-trainers --no-deps $(TRAINERS)
	@touch $@

check: .venv/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/codespell $(SPELLED)
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 -m "$(FAST)"

# The generated pages of docs/reference, and the site of all pages in build/site.
docs: .venv/.installed-dev
	@$(BIN)/python -m tests.support.documentation.reference
	@$(BIN)/python -m tests.support.documentation.site

# The long campaign of tests/attack, with its figures by area; the short one is part of `make test`.
attack: export PIXART_ATTACK := long
attack: .venv/.installed-dev vllm-env
	@$(BIN)/python -m pytest -q -n $(WORKERS) tests/attack tests/end_to_end/test_captioning.py

# vLLM's environment is installed beside the tests, of which those that need it wait for it.
test: .venv/.installed-dev
	@mkdir -p .venv-vllm
	@$(MAKE) --no-print-directory --jobs=2 vllm-env img2dataset-env test-all

vllm-env:
	@sh tests/support/vllm_environment.sh .venv-vllm

test-all:
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/codespell $(SPELLED)
	@$(BIN)/python -m tests.support.debian_packages
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not slurm and not vllm"
	@$(BIN)/python -m pytest -m "slurm or vllm"

# img2dataset needs other versions than the suite; the tests of its files are skipped without this environment.
img2dataset-env: .venv/.installed-dev
	@$(BIN)/uv venv --quiet --allow-existing --python $(BIN)/python .venv-img2dataset
	@$(BIN)/uv pip install --quiet --python .venv-img2dataset/bin/python "img2dataset==1.47.0"

gpu-env:
	@sh tests/support/environment_of_versions.sh .venv-gpu "$(GPU_PYTHON)" $(GPU_VERSIONS)

test-gpu-env: gpu-env
	@.venv-gpu/bin/python -m pytest -q -n auto --maxprocesses 4 -m "$(FAST)" tests/pixart tests/conversion

test-newest:
	@sh tests/support/environment_of_versions.sh .venv-newest "$(PYTHON)" $(NEWEST_VERSIONS)
	@.venv-newest/bin/python -m pytest -q -n auto --maxprocesses 4 -m "$(FAST)" tests/pixart tests/conversion

# Every part of the GPU day at tiny size, from what would be carried alone; see benchmarks/gpu_day.py.
gpu-day-rehearsal: install
	@$(BIN)/python -m benchmarks.gpu_day prepare $(GPU_DAY_DATA)
	@sh benchmarks/gpu_day_rehearsal.sh "$(GPU_PYTHON)"

clean:
	rm -rf .venv .venv-vllm .venv-img2dataset .venv-torchao .venv-trainers .venv-gpu .venv-newest .venv-gpu-bare .gpuday outputs build *.egg-info
