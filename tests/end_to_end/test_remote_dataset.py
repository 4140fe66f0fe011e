"""Training by the launcher on a dataset copied to S3; hostile images in a complete task."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from jobs.tasks import caption, init_dataset
from jobs.tracking.mlflow_store import read_journal
from pixart.config.dataset import DataConfig
from pixart.config.recipe import Recipe, to_json
from pixart.data.images.screening import Reason
from pixart.recipes import demo
from tests.pixart.data.store.test_remote_store import environment, server  # noqa: F401 - fixtures
from tests.support.environment import bare_environment
from tests.support.mutations import COUNT, mutated_images

pytestmark = pytest.mark.slow
SMALL = [
    "data.max_images=64",
    "data.num_shards=4",
    "stage1.global_batch_size=8",
    "stage1.steps=4",
    "stage1.warmup_steps=2",
]
ACCESS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "PIXART_CACHE")


def train(home: Path, variables: dict[str, str], *arguments: str) -> list[float]:
    """Train four steps with the launcher and return their losses."""
    settings = [word for value in SMALL for word in ("--set", value)]
    command = [sys.executable, "-m", "jobs.launch", "train", "--home", str(home), *settings, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=home, env={**bare_environment(), **variables}
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    run = sorted(home.glob("runs/*-train-*"))[-1]
    return [line["metrics"]["train/loss"] for line in read_journal(run)[0] if "train/loss" in line.get("metrics", {})]


def test_training_from_s3_is_that_from_the_disk(tmp_path, environment, monkeypatch):  # noqa: F811
    import os

    variables = {name: os.environ[name] for name in ACCESS}
    near = train(tmp_path, variables)
    system = fsspec.filesystem("s3")
    system.mkdir("bucket")
    system.put(str(tmp_path / "datasets/demo"), "bucket/demo", recursive=True)
    assert train(tmp_path, variables, "--dataset", "s3://bucket/demo") == near
    assert (Path(os.environ["PIXART_CACHE"]) / "cache.db").exists()


def test_hostile_images_through_a_task(tmp_path):
    """Each of 500 images has a row with a verdict, and no file prevents the task from finishing."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, (_, data) in enumerate(mutated_images()):
        (folder / f"{index:03d}.jpg").write_bytes(data)
        (folder / f"{index:03d}.txt").write_text("a picture of a room")  # without words, every row would be rejected
    recipe: Recipe = demo(str(tmp_path))
    data = DataConfig(path=str(tmp_path / "data"), source=str(folder), num_shards=4, image_size=64)
    init_dataset.run(
        to_json(Recipe(**{name: getattr(recipe, name) for name in recipe.__slots__ if name != "data"}, data=data))
    )
    caption.run(data.path, [0, 1, 2, 3])
    rows = [row for shard in range(4) for row in pq.read_table(caption.part_path(data.path, shard)).to_pylist()]
    assert [row["id"] for row in rows] == [f"{index:03d}.jpg" for index in range(COUNT)]
    verdicts = Counter(row["reason"] for row in rows)
    assert set(verdicts) <= {*Reason, ""}
    assert verdicts[""] == sum(row["valid"] for row in rows) >= 50
    assert all(row["detail"] for row in rows if not row["valid"])
