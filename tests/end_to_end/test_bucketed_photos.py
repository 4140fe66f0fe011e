"""Every job with real photos of mixed shapes in six aspect buckets: captions, both stages, conversion, FP8, samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs import launch
from jobs.tracking.mlflow_store import read_journal
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.encoders.vae import decode as decode_latents
from pixart.data.encoders.vae import encode, load_vae
from pixart.data.images.screening import decode, resize_and_crop
from pixart.data.store.layout import LATENTS
from pixart.data.store.zarr_store import Store
from tests.support.environment import bare_environment

pytestmark = pytest.mark.slow

BUCKETS = "128x128,160x96,144x112,112x144,96x160,192x80"
LATENT_SIZES = {(16, 16), (12, 20), (14, 18), (18, 14), (20, 12), (10, 24)}
PHOTOS, STEPS = 96, 30
SETTINGS = {
    "data.num_shards": 2,
    "data.max_images": "none",
    "data.image_size": 128,
    "data.aspect_buckets": BUCKETS,
    "model.dim": 64,
    "model.cond_dim": 64,
    "model.num_heads": 4,
    "model.num_blocks": 2,
    "model.base_latent_size": 16,
    "model.num_classes": 97,
    "stage1.steps": STEPS,
    "stage1.global_batch_size": 16,
    "stage1.warmup_steps": 3,
    "stage2.steps": STEPS,
    "stage2.global_batch_size": 16,
    "stage2.warmup_steps": 3,
    "sample.steps": 4,
}


@pytest.fixture(scope="module")
def home(shared_data, tmp_path_factory) -> Path:
    """Home with all outputs that the tests below examine, written by a user's commands."""
    home = tmp_path_factory.mktemp("bucketed-photos")
    sources = {"data.source": shared_data / "photos", "data.vae": shared_data / "tiny-vae"}
    overrides = [word for key, value in {**SETTINGS, **sources}.items() for word in ("--set", f"{key}={value}")]
    dataset = ["--dataset", str(home / "photos")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**bare_environment(), "PIXART_CLUSTER": "local"}.items():
            patch.setenv(name, value)

        def run(*words: str) -> None:
            assert launch.main([*words, "--home", str(home)]) == 0

        run("caption", *dataset, *overrides)
        run("latents", *dataset, *overrides)
        run("audit", *dataset)
        run("train", "--stage", "1", *dataset, *overrides)
        stage1 = last_checkpoint(home)
        run("convert", str(stage1), "--num-batches", "2")
        run("train", "--from", f"{stage1}.fp8", *overrides)
        sizes = ["--size", "128x128", "--size", "192x80", "--size", "112x144"]
        run("sample", str(last_checkpoint(home)), "--prompt", "a photo of a cup", *sizes, *overrides)
    return home


def run_folders(home: Path, kind: str) -> list[Path]:
    """Return the run folders of a kind, oldest first."""
    return sorted(path for path in (home / "runs").iterdir() if f"-{kind}-" in path.name)


def last_checkpoint(home: Path) -> Path:
    return checkpoints.find(run_folders(home, "train")[-1])


def psnr(images: np.ndarray, expected: np.ndarray) -> float:
    """Return the PSNR in dB of images with values from 0 to 255."""
    return float(10 * np.log10(255**2 / np.square(images.astype(np.float64) - expected).mean()))


def test_the_crop_loss_is_less_than_a_third_of_that_of_squares(home):
    summary = json.loads((home / "photos/audit/audit.json").read_text())
    shapes = summary["shapes"]
    assert len(shapes) == 6
    assert sum(shape["images"] for shape in shapes) == PHOTOS
    assert min(shape["images"] for shape in shapes) > 0
    lost, by_square = (
        sum(shape["images"] * shape[name] for shape in shapes) / PHOTOS for name in ("cropped", "cropped_by_square")
    )
    print(f"cropped away {lost:.2%}, by squares {by_square:.2%}: {lost / by_square:.3f}")
    assert lost < by_square / 3


def test_stored_latents_decode_to_the_photos_of_every_bucket(home, shared_data):
    """The PSNR is that of the VAE in each bucket; storing the latents costs less than 0.1 dB."""
    manifest = manifests.read(home / "photos")
    store, vae = Store(manifest), load_vae(str(shared_data / "tiny-vae"))
    rows = store.valid_rows()
    assert len(rows) == PHOTOS
    photos = sorted(shared_data.glob("photos/*/*.jpg"))
    for bucket, (height, width) in enumerate(manifest.image_shapes):
        members = rows[store.bucket_of(rows) == bucket][:8]
        images = np.stack(
            [
                np.asarray(resize_and_crop(decode(photos[row].read_bytes(), manifest.data.screening), height, width))
                for row in members
            ]
        )
        direct = decode_latents(vae, torch.from_numpy(encode(vae, images, (-1, 1)).astype(np.float32)), (-1, 1))
        stored = decode_latents(vae, torch.from_numpy(store.read(LATENTS, members).astype(np.float32)), (-1, 1))
        print(f"{width}x{height}: PSNR of the VAE {psnr(direct, images):.2f} dB, stored {psnr(stored, images):.2f} dB")
        assert psnr(direct, images) > 18
        assert abs(psnr(direct, images) - psnr(stored, images)) < 0.1


def test_both_stages_train_and_the_conversion_calibrates_on_every_bucket(home):
    for run in run_folders(home, "train"):
        lines, _ = read_journal(run)
        losses = [line["metrics"]["train/loss"] for line in lines if "train/loss" in line.get("metrics", {})]
        assert len(losses) == STEPS
        assert np.mean(losses[-10:]) < np.mean(losses[:5])
    stage1, stage2 = (checkpoints.find(run) for run in run_folders(home, "train"))
    report = json.loads((Path(f"{stage1}.fp8") / "report.json").read_text())
    assert {tuple(size) for size in report["calibration_latents"]} == LATENT_SIZES
    assert report["acceptance"]["passed"]
    before, *_, after = report["losses"].values()
    print(f"loss {before:.5f} before the conversion, {after:.5f} after: {after / before - 1:+.2%}")
    assert abs(after / before - 1) < 0.01
    converted, trained = checkpoints.load(f"{stage1}.fp8"), checkpoints.load(stage2)
    assert (trained.stage, trained.step) == (2, STEPS)
    assert trained.plan is not None
    assert any(not torch.equal(trained.scales[key], converted.scales[key]) for key in converted.scales)


def test_samples_have_the_requested_sizes(home):
    pictures = sorted((run_folders(home, "sample")[0] / "samples").glob("*.png"))
    images = [Image.open(picture) for picture in pictures]
    assert [image.size for image in images] == [(128, 128), (192, 80), (112, 144)]
    assert all(np.asarray(image).std() > 5 for image in images)
