"""Requests rewritten by a real vLLM engine in a job, and by a real vLLM server."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart.checkpoint import directory as checkpoints
from tests.jobs.tasks.test_sample import checkpoint_of
from tests.support.environment import bare_environment
from tests.support.vllm_fixture import PYTHON, VARIABLES, needs_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.slow, needs_vllm]
LONG = "two boats " * 600  # more tokens than the model accepts
REQUESTS = ["a dog on a red ball", LONG.strip(), "a house in the morning light"]
SECONDS = 240  # maximum time until a server responds


def recaption(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return launch(folder, "recaption", *arguments)


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.launch", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=bare_environment())


def vllm_profile(folder: Path) -> Path:
    """Write a cluster profile that runs the caption job in the Python environment of vLLM; return its path."""
    profile = folder / "vllm.toml"
    lines = ['executor = "local"', "[python]", f'caption = "{PYTHON}"', "[environment]"]
    profile.write_text("\n".join([*lines, *(f'{name} = "{value}"' for name, value in VARIABLES.items())]))
    return profile


def test_recaption_as_a_job(tmp_path, tiny_qwen):
    """A random model does not answer with text: each request is rewritten, or kept and logged as unchanged."""
    profile = vllm_profile(tmp_path)
    (tmp_path / "requests.txt").write_text("\n".join(REQUESTS[1:]) + "\n\n")
    done = recaption(
        tmp_path, REQUESTS[0], "--file", "requests.txt", "--output", "out.parquet", "--cluster", str(profile),
        "--model", str(tiny_qwen),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "rewritten: out.parquet\n"
    check(pq.read_table(tmp_path / "out.parquet").to_pylist(), done.stderr)


def check(rows: list[dict[str, str]], log: str) -> None:
    """Assert that each request was rewritten, or kept with a problem that is logged."""
    assert [row["request"] for row in rows] == REQUESTS
    assert rows[1]["problem"] == "not answered"
    for row in rows:
        assert (row["text"] == row["request"]) == bool(row["problem"])
        assert (f"unchanged ({row['problem']}): {row['request']}" in log) == bool(row["problem"])


@pytest.fixture
def server(tiny_qwen) -> Iterator[str]:
    """URL of a vLLM server with a tiny model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_qwen, "--served-model-name", "tiny"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "1024"]
    process = subprocess.Popen(words, env=os.environ | VARIABLES, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}/v1"
    begun = time.monotonic()
    while True:
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() - begun < SECONDS, "the server does not begin"
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).read()
            break
        except OSError:
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(60)


def test_recaption_by_a_server(tmp_path, server):
    (tmp_path / "requests.txt").write_text("\n".join(REQUESTS))
    done = recaption(tmp_path, "--file", "requests.txt", "--output", "out.jsonl", "--server", server)
    assert done.returncode == 0, done.stdout + done.stderr
    check([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], done.stderr)
    assert not (tmp_path / "outputs/runs").exists()
    done = recaption(tmp_path, REQUESTS[0], "--server", server, "--model", "another")
    assert done.returncode == 2
    assert "answers 404" in done.stderr
    assert done.stderr.count("\n") == 1


def test_sampling_rewrites_first(tmp_path, tiny_qwen, small_recipe):
    """A job in the captioner's Python rewrites before sampling; images have both texts, and problems are logged."""
    saved = checkpoints.save(checkpoint_of(small_recipe, 2), tmp_path / "checkpoint")
    words = ["sample", str(saved), "--prompt", REQUESTS[0], "--prompt", LONG, "--recaption", "--model", str(tiny_qwen)]
    words += ["--cluster", str(vllm_profile(tmp_path)), "--set", "sample.steps=1"]
    done = launch(tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"unchanged (not answered): {LONG}" in done.stderr
    (rewritten,) = tmp_path.glob("outputs/runs/*-recaption-*/rewritten.jsonl")
    first, second = (json.loads(line) for line in rewritten.read_text().splitlines())
    (folder,) = tmp_path.glob("outputs/runs/*-sample-*/samples")
    for line, name in ((first, "0000.png"), (second, "0001.png")):
        text = Image.open(folder / name).text
        assert (text["request"], text["prompt"]) == (line["request"], line["text"])
