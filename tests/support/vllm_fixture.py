"""A vLLM in a separate environment, and a tiny model for it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm/bin/python"
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}

needs_vllm = pytest.mark.skipif(
    not PYTHON.parents[1].is_dir(),
    reason="no vLLM: make its environment by `sh tests/support/vllm_environment.sh .venv-vllm`",
)


@pytest.fixture(scope="session")
def vllm_environment() -> Path:
    """Path of the Python of vLLM's environment; waits if `make test` is still installing it."""
    command = ["sh", ROOT / "tests/support/vllm_environment.sh", PYTHON.parents[1]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return PYTHON


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory, vllm_environment: Path) -> Path:
    """Folder of a tiny Qwen3-VL with random weights."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    command = [PYTHON, ROOT / "tests/support/tiny_qwen.py", folder]
    done = subprocess.run(command, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def answering_qwen(tmp_path_factory: pytest.TempPathFactory, vllm_environment: Path) -> Path:
    """Folder of a tiny Qwen3-VL with random weights, whose vocabulary has yes and no."""
    folder = tmp_path_factory.mktemp("model") / "qwen"
    command = [PYTHON, ROOT / "tests/support/tiny_qwen.py", folder, "yes no Yes No"]
    done = subprocess.run(command, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
