"""A checkpoint of the original training, whose VAE encoded pixels in [0, 1], against a dataset in [-1, 1]."""

import dataclasses
from pathlib import Path

import pytest
import torch

from conversion import to_fp8
from conversion.reading import formats
from jobs import launch
from jobs.tasks import caption, init_dataset, latents
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.model.dit import DiT

pytestmark = pytest.mark.slow
SIZES = {"in_dim": 16, "dim": 32, "cond_dim": 32, "num_heads": 2, "num_blocks": 2, "base_image_size": 8}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """Path of a `.pt` file of a stage-1 model of the original training."""
    torch.manual_seed(0)
    model = DiT(**SIZES, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path_factory.mktemp("original") / "stage1.pt"
    torch.save({"model": model.state_dict(), "step": 9}, path)
    return path


def refusal(capsys, words: list[str], tmp_path: Path) -> str:
    """Run a command of the launcher, check that it fails with exit code 2, and return its last error line."""
    assert launch.main([*words, "--home", str(tmp_path), "--cluster", "local"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_train_convert_and_sample_refuse_a_dataset_of_the_other_range(original, small_recipe, tmp_path, capsys):
    dataset, output = small_recipe.data.path, tmp_path / "stage1.fp8"
    both = ("[0, 1]", "[-1, 1]", "--set data.pixel_range=0,1")
    convert = [str(original), "--base-latent-size", "8", "--dataset", dataset, "--output", str(output)]
    assert to_fp8.main(convert) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(part in error for part in both)
    assert not output.exists()

    words = ["sample", str(original), "--dataset", dataset, "--set", "model.base_latent_size=8", "--class", "1"]
    assert all(part in refusal(capsys, words, tmp_path) for part in both)

    checkpoint = tmp_path / "bf16"
    start = formats.read(original, base_latent_size=8)
    checkpoints.save(start, checkpoint)
    words = ["train", "--recipe", "demo", "--from", str(checkpoint), "--dataset", dataset, "--set", "stage1.steps=20"]
    assert all(part in refusal(capsys, words, tmp_path) for part in both)
    assert all(part in refusal(capsys, ["sample", str(checkpoint), "--dataset", dataset], tmp_path) for part in both)


def test_a_dataset_in_0_1_has_other_latents_and_trains_the_checkpoint(original, small_recipe, tmp_path, capsys):
    data = dataclasses.replace(small_recipe.data, path=str(tmp_path / "data"), pixel_range=(0, 1), num_shards=1)
    init_dataset.run(to_json(dataclasses.replace(small_recipe, data=data)))
    caption.run(data.path, [0])
    latents.run(data.path, [0])
    assert manifests.read(data.path).data.pixel_range == (0, 1)

    start = formats.read(original, base_latent_size=8)
    checkpoints.save(start, tmp_path / "bf16")
    settings = ["steps=12", "global_batch_size=8", "preview_every=0", "validate_every=0", "num_validation_samples=0"]
    overrides = [word for setting in settings for word in ("--set", f"stage1.{setting}")]
    words = ["train", "--recipe", "demo", "--from", str(tmp_path / "bf16"), "--dataset", data.path]
    words += ["--accept-failed-audit", *overrides]
    assert launch.main([*words, "--home", str(tmp_path), "--cluster", "local"]) == 0
    capsys.readouterr()
    (last,) = tmp_path.glob("runs/*-train-*/checkpoints/step-00000012")
    assert checkpoints.load(last).normalization == start.normalization
    assert checkpoints.load(last).normalization.pixel_range == (0, 1)
