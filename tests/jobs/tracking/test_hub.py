"""`release --push-to-hub` against a model hub on this machine, with an evaluation of the checkpoint."""

import shutil
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from jobs.tracking.mlflow_store import Tracker, run_id
from tests.support.demo_fixture import Demo
from tests.support.hub_fixture import TOKEN, Hub

pytestmark = pytest.mark.slow
NAME = ["--name", "pushed", "--push-to-hub"]


@pytest.fixture
def evaluated(small_demo: Demo):
    """Demo and an evaluation of its last checkpoint, which is removed at the end, as other tests take the newest."""
    before = {path for kind in ("evaluate", "summarize") for path in small_demo.runs(kind)}
    kept = set(small_demo.home.glob("evaluations/*"))
    words = ["--reference", "none", "--set", "evaluation.num_prompts=4", "--set", "evaluation.num_shards=1"]
    done = small_demo.command("evaluate", str(small_demo.runs("train")[-1]), *words, "--set", "sample.steps=2")
    assert done.returncode == 0, done.stderr
    (folder,) = set(small_demo.home.glob("evaluations/*")) - kept
    yield small_demo, folder
    made = {path for kind in ("evaluate", "summarize") for path in small_demo.runs(kind)} - before
    for path in (*made, folder):
        shutil.rmtree(path)


def test_a_release_is_pushed_with_its_card_and_evaluation(evaluated: tuple[Demo, Path], hub, monkeypatch, tmp_path):
    """The uploaded files are a pipeline that loads; the card has figures, lineage and licences."""
    demo, folder = evaluated
    monkeypatch.setenv("HF_ENDPOINT", hub)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    run = demo.runs("train")[-1]
    done = demo.command("release", str(run), *NAME, "owner/new")
    assert done.returncode == 2
    assert "did not take it (" in done.stderr
    assert "set HF_TOKEN" in done.stderr
    assert Hub.uploaded == {}

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = demo.command("release", str(run), *NAME, "owner/new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"pushed: {hub}/owner/new"
    assert [item["name"] for item in Hub.created] == ["new"]
    for name, content in Hub.uploaded.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    image = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)("a star", num_inference_steps=1)
    assert image.images[0].size == (64, 64)

    card = Hub.uploaded["README.md"].decode()
    for text in (
        "library_name: diffusers",
        "# owner/new",
        "`transformer/pixart_dit.py`",
        f"Evaluation {folder.name}: ema weights, 2 steps",
        "| counted | ",
        f"| run | {run} |",
        "| text encoder: minilm | ",
    ):
        assert text in card, card
    path = f"release/step-00000012/evaluations/{folder.name}"
    artifacts = Tracker(demo.home).client.list_artifacts(str(run_id(run)), path)
    assert sorted(item.path.rpartition("/")[2] for item in artifacts) == ["evaluation.html", "evaluation.json"]


def test_a_wrong_repository_is_refused_first(small_demo: Demo):
    done = small_demo.command("release", str(small_demo.runs("train")[-1]), *NAME, "new")
    assert done.returncode == 2
    assert done.stderr == "error: --push-to-hub 'new': is no repository; give OWNER/NAME\n"
    assert done.stdout == ""
