"""Sizes and aspect buckets that commands refuse: one line, exit code 2, and nothing written."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from jobs import launch
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.config.dataset import DataConfig
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT
from pixart.recipes import demo
from tests.support.environment import bare_environment
from tests.support.refusal import check_refusal

pytestmark = pytest.mark.slow

SQUARES = [[64, 64]]
BUCKETS = "64x64,96x48"
ODD_BUCKETS = "64x64,72x56"  # latents of 7 x 9, which a patch of 2 does not divide


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of all files in a folder by path; None for its folders."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def save_dataset(folder: Path, buckets: str | None, images: int) -> None:
    """Write the manifest and the audit of a dataset with so many images in each aspect bucket."""
    data = DataConfig(path=str(folder), image_size=64, num_shards=1, max_images=images, aspect_buckets=buckets)
    shapes = data.image_shapes
    manifest = Manifest(
        data=data,
        images=images * len(shapes),
        rows_per_shard=images * len(shapes),
        class_names=("circle", "square"),
        latent_shape=(16, 8, 8),
        buckets=tuple((height // 8, width // 8) for height, width in shapes) if buckets else (),
        text_dim=384,
        models={"vae": "aa", "text_encoder": "bb", "captioner": "labels"},
    )
    folder.mkdir()
    manifests.write(manifest)
    (folder / "audit").mkdir()
    counts = [{"width": width, "height": height, "images": images} for height, width in shapes]
    (folder / "audit/audit.json").write_text(json.dumps({"shapes": counts if buckets else []}))


@pytest.fixture
def home(tmp_path: Path, stage1: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder with datasets of squares and of buckets, a run that was trained on squares, and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - bare_environment().keys():
        monkeypatch.delenv(name)
    for name, value in bare_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    for name, buckets in (("squares", None), ("buckets", BUCKETS), ("odd", ODD_BUCKETS)):
        save_dataset(tmp_path / name, buckets, images=3)
    config = {**stage1.config, "in_dim": 16, "num_classes": 3}
    state = DiT(**config).state_dict()
    saved = dataclasses.replace(
        stage1,
        step=3,
        config=config,
        model=state,
        ema=state,
        optimizer={},
        dataset=str(tmp_path / "squares"),
        provenance={"image_shapes": SQUARES, "downsampling_factor": 8},
    )
    checkpoints.save(saved, tmp_path / "run/checkpoints/step-00000003")
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, path=str(tmp_path / "squares"))
    (tmp_path / "run/config.json").write_text(to_json(dataclasses.replace(recipe, data=data)))
    return tmp_path


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "init --set data.aspect_buckets=64x64,96x44",
            "data.aspect_buckets=64x64,96x44: 96x44 must have sides that are multiples of 8",
        ),
        (
            "caption --set data.aspect_buckets=64x64,96x44",
            "data.aspect_buckets=64x64,96x44: 96x44 must have sides that are multiples of 8",
        ),
        (
            f"init --set data.aspect_buckets={ODD_BUCKETS}",
            f"data.aspect_buckets={ODD_BUCKETS}: 72x56 must have sides that are multiples of 16",
        ),
        (
            f"pipeline --set data.aspect_buckets={ODD_BUCKETS}",
            f"data.aspect_buckets={ODD_BUCKETS}: 72x56 must have sides that are multiples of 16",
        ),
        ("init --set data.image_size=60", "data.image_size=60: must be a multiple of 8"),
        ("init --set data.aspect_buckets=64x64,96x48,64x64", "64x64 is listed twice; remove one"),
        ("init --set data.aspect_buckets=pixart --set data.image_size=72", "image_size=72 must be a multiple of 16"),
        (
            "train --dataset odd",
            "model.patch_size=2: does not divide the dataset's latents of 7 x 9",
        ),
        (
            "train --dataset buckets --set model.patch_size=4",
            "model.patch_size=4: does not divide the dataset's latents of 6 x 12",
        ),
        ("train --from run --dataset odd", "model.patch_size=2: does not divide the dataset's latents of 7 x 9"),
        ("train --dataset buckets --nodes 4", "its aspect bucket 96x48 has 3 images for 4 ranks"),
        ("train --resume run --dataset buckets", "was trained on images of 64x64, those of the dataset"),
        ("sample run --size 128x64", "--size 128x64: "),
        ("sample run --size 128x64", "was not trained at this size, but at 64x64"),
        ("sample run --size 72x64 --force-size", "--size 72x64: both sides must be multiples of 16"),
        ("sample run --size 64x64x3", "must be WIDTHxHEIGHT in pixels"),
    ],
)
def test_one_line_exit_2_and_nothing_written(home, capfd, command, message):
    before = tree(home)
    check_refusal(launch.main, command.split(" "), message, capfd)
    assert tree(home) == before
