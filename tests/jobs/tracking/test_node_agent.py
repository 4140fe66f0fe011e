"""The node agent's reading of nvidia-smi, of which a shell script prints what drivers have been seen to print."""

import pytest

from jobs.tracking import node_agent
from jobs.tracking.node_agent import gpu_metrics


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Callable that puts a script in place of nvidia-smi."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


def test_means_over_the_gpus(nvidia_smi):
    nvidia_smi("printf '50, 1000, 300.5\\n100, 3000, 299.5\\n'")
    assert gpu_metrics() == {
        "gpu_utilization_percentage": 75,
        "gpu_memory_usage_megabytes": pytest.approx(2000 * 2**20 / 1e6),
        "gpu_power_usage_watts": 300,
    }


@pytest.mark.parametrize("word", ["[Not Supported]", "[Unknown Error]", "[GPU requires reset]", "[N/A]", ""])
def test_words_in_place_of_numbers_are_left_out(nvidia_smi, word):
    nvidia_smi(f"printf '{word}, 100, 50\\n30, {word}, 70\\n'")
    assert gpu_metrics() == {
        "gpu_utilization_percentage": 30,
        "gpu_memory_usage_megabytes": pytest.approx(100 * 2**20 / 1e6),
        "gpu_power_usage_watts": 60,
    }


@pytest.mark.parametrize("script", ["exit 9", "echo 'No devices were found'", "sleep 5", "printf '\\377\\376'"])
def test_no_answer_is_no_metric(nvidia_smi, monkeypatch, script):
    monkeypatch.setattr(node_agent, "NVIDIA_SMI_SECONDS", 0.5)
    nvidia_smi(script)
    assert gpu_metrics() == {}


def test_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_metrics() == {}
