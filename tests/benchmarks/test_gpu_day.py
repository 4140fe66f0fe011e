"""Each part of the GPU day runs all of its steps even if some fail, and the bundled files suffice."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_day, gpu_day_dataset
from benchmarks.gpu_day import Step, run_part
from pixart.data.encoders.text_encoder import TextEncoder


def script(text: str) -> list[str]:
    """Return the arguments of Python that run a script."""
    return ["-c", text]


def test_failed_or_hanging_step_does_not_stop_the_others(monkeypatch, tmp_path):
    ends = script("print('measured')")
    steps = [
        Step(name="first", limit=30, words=ends, writes=False),
        Step(name="fails", limit=30, words=script("raise SystemExit(3)"), writes=False),
        Step(name="hangs", limit=1, words=script("import time; time.sleep(60)"), writes=False),
        Step(name="last", limit=30, words=ends, writes=False),
    ]
    monkeypatch.setattr(gpu_day, "PARTS", {"trial": steps})
    begun = time.monotonic()
    assert run_part("trial", tmp_path, tiny=False) == 2
    assert time.monotonic() - begun < 30
    (summary,) = tmp_path.glob("*-gpu-day-trial.md")
    rows = [line.strip("| ").split(" | ") for line in summary.read_text().splitlines()[4:]]
    assert [(row[0], row[2]) for row in rows] == [
        ("first", "ok"),
        ("fails", "exit code 3"),
        ("hangs", "killed after 1 s"),
        ("last", "ok"),
    ]
    assert (tmp_path / "trial.log").read_text().count("measured") == 2


def test_every_step_of_the_day_can_be_started():
    """The modules of the steps exist, and the time limits of a part sum to less than ten minutes."""
    for name, steps in gpu_day.PARTS.items():
        assert sum(step.limit for step in steps) <= 590, name
        for step in steps:
            if step.writes:
                assert (gpu_day.ROOT / f"{step.words[1].replace('.', '/')}.py").exists()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> Path:
    """Folder of a text encoder pruned to the tokens of two captions."""
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    gpu_day_dataset.prune(folder, ["a tabby cat", "an acorn on a table"])
    return folder


def test_bundled_encoder_equals_the_complete_encoder(pruned):
    texts = ["a tabby cat on a table", ""]
    exact, mask = TextEncoder("minilm", max_tokens=12, scale=1.0).encode(texts)
    states, same_mask = TextEncoder(str(pruned), max_tokens=12, scale=1.0).encode(texts)
    assert torch.equal(mask, same_mask)
    assert (states - exact).norm() < 0.01 * exact.norm()  # half precision
    assert sum(file.stat().st_size for file in pruned.rglob("*")) < 24 << 20


def test_step_without_prepared_files_names_the_command_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_day, "SITE", tmp_path / "site")
    monkeypatch.setattr(gpu_day, "WHEELS", tmp_path)
    with pytest.raises(SystemExit, match="gpu_day prepare"):
        gpu_day.install()
