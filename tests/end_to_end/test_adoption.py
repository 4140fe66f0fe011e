"""Commands on adopted datasets: adopt, audit, verify, both stages of training, convert, sample, lineage, refusals."""

import os
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from jobs.state import run as runs
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from tests.support.demo_fixture import launch
from tests.support.precomputed import torch_entries, write_array_record, write_torch_shards

pytestmark = pytest.mark.slow
MODELS = {"data.vae": "demo", "data.text_encoder": "minilm"}
SETTINGS = {"model.dim": 32, "model.cond_dim": 32, "model.num_heads": 2, "model.num_blocks": 2, "model.num_classes": 6}
for STAGE in (1, 2):
    SETTINGS |= {f"stage{STAGE}.{key}": 0 for key in ("validate_every", "num_validation_samples", "preview_every")}
    SETTINGS |= {f"stage{STAGE}.steps": 50, f"stage{STAGE}.global_batch_size": 8, f"stage{STAGE}.warmup_steps": 2}


def words(settings: dict) -> list[str]:
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def succeed(folder: Path, *arguments: str, settings: dict | None = None) -> str:
    """Run a command of the launcher, assert that it succeeds, and return its output."""
    done = launch(folder, *arguments, *words(settings or {}))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(folder: Path, *arguments: str, settings: dict | None = None) -> str:
    """Run a command of the launcher, assert that it is bad input, and return its one line."""
    done: subprocess.CompletedProcess[str] = launch(folder, *arguments, *words(settings or {}))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the adopted datasets `labels` and `captions`, each of two shards of different lengths."""
    folder = tmp_path_factory.mktemp("adoption")
    (folder / "names.txt").write_text("cat\ndog\nfish\nbird\nowl\n")
    for form, options in (("labels", ["--class-names", "names.txt"]), ("captions", ["--array", "0-1%1"])):
        write_torch_shards(folder / f"shards-{form}", form, [60, 40])
        arguments = ["adopt", f"shards-{form}", "--dataset", form, *options]
        output = succeed(folder, *arguments, settings=MODELS)
        assert f"adopted: 2 shards, 100 of 100 rows valid, in {folder}/{form}" in output
        assert "pixels from 0 to 1" in output
        assert "matches its ledger" in succeed(folder, "verify", "--dataset", form)
        audited = succeed(folder, "audit", "--dataset", form)
        assert f"next: python -m jobs.launch train --stage {1 if form == 'labels' else 2}" in audited
    return folder


def newest_run(home: Path) -> Path:
    return runs.folders(home / "outputs")[-1]


def test_both_stages_train_convert_and_sample(home):
    succeed(home, "train", "--stage", "1", "--dataset", "labels", settings=SETTINGS)
    stage1 = checkpoints.find(newest_run(home))
    succeed(home, "sample", str(stage1), "--class", "owl", "--class", "0", settings={"sample.steps": 2})
    (sheet,) = newest_run(home).glob("samples.png")
    assert Image.open(sheet).info["captions"] == f"adopted from {home}/shards-labels"
    succeed(home, "convert", str(stage1), "--dataset", "captions")
    settings = {**SETTINGS, "stage2.short_caption_prob": 0.5}
    succeed(home, "train", "--from", f"{stage1}.fp8", "--dataset", "captions", settings=settings)
    succeed(home, "sample", str(checkpoints.find(newest_run(home))), settings={"sample.steps": 2, "sample.count": 2})
    lineage = succeed(home, "lineage", str(newest_run(home) / "samples/0000.png"))
    assert f"source        adopted from {home}/shards-captions" in lineage
    assert "captioner     adopted (adopted-" in lineage
    assert "instruction   adopted" in lineage


def test_commands_that_need_images_or_captions_are_refused(home):
    for command in ("caption", "latents"):
        message = refused(home, command, "--dataset", "labels")
        assert "was adopted from" in message
    message = refused(home, "train", "--stage", "2", "--dataset", "labels", settings={"stage2.fp8": False})
    assert "without captions; stage 2 needs captions" in message
    assert "with the captioner adopted" in refused(
        home, "adopt", "shards-captions", "--dataset", "labels", settings=MODELS
    )
    assert "data.captioner=adopted" in refused(home, "init", "--dataset", "new", settings={"data.captioner": "adopted"})


def test_missing_shards_are_adopted_by_the_same_command(home, tmp_path):
    write_torch_shards(tmp_path / "shards", "tokens", [30, 20, 10])
    arguments = ["adopt", f"{tmp_path}/shards/shard_*.pt", "--dataset", "part"]
    succeed(tmp_path, *arguments, "--array", "1", settings=MODELS)
    dataset = tmp_path / "part"
    assert Store(manifests.read(dataset)).valid_rows().tolist() == list(range(30, 50))
    message = refused(
        tmp_path,
        "train",
        "--stage",
        "2",
        "--accept-failed-audit",
        "--dataset",
        "part",
        settings={**SETTINGS, "stage2.fp8": False},
    )
    assert "2 of 3 shards are not adopted" in message
    assert "shard 3 does not exist" in refused(tmp_path, *arguments, "--array", "3", settings=MODELS)
    before = (dataset / "captions/00001.parquet").stat().st_mtime_ns
    output = succeed(tmp_path, *arguments, settings=MODELS)
    assert "60 of 60 rows valid" in output
    assert (dataset / "captions/00001.parquet").stat().st_mtime_ns == before
    (dataset / "captions/00002.parquet").write_bytes(b"")
    assert f"next: python -m jobs.launch adopt '{tmp_path}/shards/shard_*.pt'" in succeed(
        tmp_path, "verify", "--dataset", "part"
    )


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    write_torch_shards(tmp_path / "shards", "labels", [30])
    write_array_record(tmp_path / "bad.array_record", [{"latent": Malicious(), "label": 1}])
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "same.txt").write_text("a\na\n")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for source, options, message in (
        ("empty", [], "there are no shards"),
        ("nowhere", [], "there are no shards"),
        ("s3://bucket/shards", [], "is a URL"),
        ("bad.array_record", [], "the name posix.system"),
        ("shards", ["--class-names", "two.txt"], "the file has 2 names, and the shards have the label 4"),
        ("shards", ["--class-names", "same.txt"], "'a' is there 2 times"),
        ("shards", ["--class-names", "nowhere"], "No such file"),
        ("shards", ["--array", "7"], "shard 7 does not exist"),
        ("shards", ["--set", "data.num_shards=3"], "data.num_shards=3: with these shards it is 1"),
        ("shards", ["--set", "data.store_text_embeddings=true"], "data.store_text_embeddings=True"),
        ("shards", ["--set", "data.source=elsewhere"], "the argument SOURCE names the shards"),
    ):
        assert message in refused(tmp_path, "adopt", source, "--dataset", "new", *options, settings=MODELS)
    assert "name the VAE" in refused(tmp_path, "adopt", "shards", "--dataset", "new")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_and_another_pixel_range(tmp_path):
    write_torch_shards(tmp_path / "shards", "labels", [30])
    arguments = ["adopt", "shards", "--dataset", "new"]
    before = sorted(tmp_path.rglob("*"))
    assert "1 shards in 1 processes" in succeed(tmp_path, *arguments, "--dry-run", settings=MODELS)
    assert sorted(tmp_path.rglob("*")) == before
    succeed(tmp_path, *arguments, settings={**MODELS, "data.pixel_range": "-1,1"})
    assert manifests.read(tmp_path / "new").data.pixel_range == (-1, 1)
    assert manifests.read(tmp_path / "new").class_names == tuple(
        str(label) for label in range(int(torch_entries("labels", 30)["labels"].max()) + 1)
    )
