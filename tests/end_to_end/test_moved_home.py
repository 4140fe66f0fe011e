"""A home that was copied to another disk twice, with the original still there: lineage, sample, resume and MLflow."""

import json
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs.state.run import load
from jobs.tracking.mlflow_store import Tracker, run_id
from tests.support.demo_fixture import STEPS, Demo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def moved(small_demo: Demo, tmp_path_factory) -> Demo:
    """Demo whose home was copied without its times, used there, and copied again."""
    first = Demo(folder=tmp_path_factory.mktemp("first"), output="")
    shutil.copytree(small_demo.home, first.home, copy_function=shutil.copyfile)
    assert first.command("sync").returncode == 0
    second = Demo(folder=tmp_path_factory.mktemp("second"), output="")
    shutil.copytree(first.home, second.home, copy_function=shutil.copyfile)
    assert second.command("sync").returncode == 0
    return second


def facts(home: Path) -> dict[str, object]:
    """Return what MLflow says about every run of a home, and the points of its metrics."""
    client = Tracker(home).client
    (experiment,) = client.search_experiments(filter_string="name = 'pixart'")
    return {
        run.info.run_id: (
            run.info.run_name,
            run.info.start_time,
            run.info.end_time,
            run.info.status,
            sorted(run.data.params.items()),
            [
                (point.key, point.step, point.value, point.timestamp)
                for key in sorted(run.data.metrics)
                for point in client.get_metric_history(run.info.run_id, key)
            ],
            sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        )
        for run in client.search_runs([experiment.experiment_id])
    }


def test_mlflow_says_the_same_of_a_moved_home(small_demo, moved):
    assert facts(moved.home) == facts(small_demo.home)
    client = MlflowClient(f"sqlite:///{moved.home}/mlflow.db")
    identifier = run_id(moved.runs("train")[-1])
    assert client.get_run(identifier).info.artifact_uri.startswith((moved.home / "mlartifacts").as_uri())
    assert "Gradient norm" in Path(client.download_artifacts(identifier, "summary.html", str(moved.folder))).read_text()


def test_records_hold_paths_relative_to_the_home(moved):
    for run in (moved.home / "runs").iterdir():
        assert "/demo0/" not in (run / "run.json").read_text()
        assert str(moved.home) not in (run / "run.json").read_text()
        assert load(run).dataset.startswith(str(moved.home))
    (checkpoint,) = (moved.runs("train")[-1] / "checkpoints").glob(f"step-{STEPS:08d}")
    assert json.loads((checkpoint / "training.json").read_text())["dataset"] == "{home}/datasets/demo"


def test_lineage_of_an_image_stays_in_the_moved_home(small_demo, moved, tmp_path):
    image = min((moved.runs("sample")[-1] / "samples").glob("*.png"))
    shutil.copy(image, tmp_path / "image.png")
    for picture in (image, tmp_path / "image.png"):
        done = moved.command("lineage", str(picture))
        assert done.returncode == 0, done.stderr
        assert str(small_demo.home) not in done.stdout
        assert "no longer exists" not in done.stdout
        for kind in ("train", "convert"):
            assert moved.runs(kind)[-1].name in done.stdout
        assert f"dataset  {moved.home}/datasets/demo" in done.stdout


def test_sampling_and_resuming_in_the_moved_home(small_demo, moved):
    before = sorted(small_demo.home.rglob("*"))
    done = moved.command("sample", str(moved.runs("train")[-1]), "--prompt", "a red cube", "--set", "sample.steps=1")
    assert done.returncode == 0, done.stderr
    more = STEPS + 2
    done = moved.command("train", "--resume", str(moved.runs("train")[-1]), "--set", f"stage2.steps={more}")
    assert done.returncode == 0, done.stderr
    assert (moved.runs("train")[-1] / f"checkpoints/step-{more:08d}").exists()
    assert sorted(small_demo.home.rglob("*")) == before  # the original is not touched
