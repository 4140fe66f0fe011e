"""From the files of the original training to an image: adopted latents, TransformerEngine and JAX checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.state import run as runs
from pixart.checkpoint import directory as checkpoints
from pixart.data.encoders.vae import decode, load_vae
from pixart.data.store.zarr_store import Store
from tests.end_to_end.test_adoption import newest_run, succeed
from tests.pixart.data.encoders.test_vae import psnr
from tests.support.adoption import adopted
from tests.support.demo_fixture import launch
from tests.support.precomputed import make_t5gemma

pytestmark = pytest.mark.slow
TEXT_DIM = 48  # of the TransformerEngine files
STEPS = 50


@pytest.fixture(scope="module")
def home(shared_data, tmp_path_factory) -> Path:
    """Folder with the adopted dataset `tokens`, whose text encoder has the width that the checkpoints read."""
    folder = tmp_path_factory.mktemp("original")
    encoder = make_t5gemma(folder / "encoder", 30_000, TEXT_DIM)
    models = {"data.vae": shared_data / "tiny-vae", "data.text_encoder": encoder}
    output = succeed(
        folder, "adopt", str(shared_data / "adopt/tokens_shard_000000.pt"), "--dataset", "tokens", settings=models
    )
    assert "36 of 48 rows valid" in output
    return folder


def train_and_sample(home: Path, start: Path, first: int, *options: str) -> None:
    """Train STEPS steps of stage 2 in FP8 from a checkpoint of step `first`, and sample an image of the result."""
    settings = {"steps": first + STEPS, "global_batch_size": 4, "precision": "bf16", "fp8": "true", "warmup_steps": 2}
    settings |= {"validate_every": 0, "num_validation_samples": 0, "preview_every": 0, "lr": 1e-4}
    words = ["train", "--recipe", "xl", "--from", str(start), "--dataset", "tokens", "--accept-failed-audit", *options]
    changed = {f"stage2.{key}": value for key, value in settings.items()}
    succeed(home, *words, settings={**changed, "stage2.compile": "false", "stage2.activation_checkpointing": "none"})
    last = checkpoints.find(newest_run(home))
    trained = checkpoints.load(last)
    assert (trained.stage, trained.step) == (2, first + STEPS)
    assert trained.plan is not None
    assert trained.normalization.pixel_range == (0, 1)
    settings = {"sample.steps": 4, "sample.guidance": 1}
    succeed(home, "sample", str(last), "--prompt", "word20 word21", "--frames", settings=settings)
    run = newest_run(home)
    assert Image.open(run / "samples/0000.png").size == (256, 256)
    assert Image.open(run / "samples/0000.gif").n_frames == 4
    traced = succeed(home, "lineage", str(run / "samples/0000.png"))
    assert "adopted from" in traced


def test_stage_2_of_transformer_engine_continues_in_fp8(home, shared_data):
    source, output = shared_data / "te/stage2_training.pt", home / "te.fp8"
    words = ["convert", str(source), "--output", str(output), "--dataset", "tokens", "--base-latent-size", "16"]
    succeed(home, *words)
    start = checkpoints.load(output)
    assert (start.stage, start.step, start.config["qk_norm_eps"]) == (2, 4, 1e-5)
    assert float(start.optimizer["linear_out.weight.exp_avg_sq"].abs().max()) > 0
    train_and_sample(home, output, start.step)


def test_stage_1_of_jax_continues_through_stage_2(home, shared_data):
    """The file is three steps from random weights: the loss changes by more than its acceptance check allows."""
    source, output = shared_data / "jax/stage1/3", home / "jax.fp8"
    words = ["convert", str(source), "--output", str(output), "--dataset", "tokens"]
    done = launch(home, *words)
    assert done.returncode in (0, 2), done.stderr
    start = checkpoints.load(output)
    assert (start.stage, start.config["qk_norm_bias"], start.config["text_dim"]) == (2, True, TEXT_DIM)
    assert runs.folders(home / "outputs")
    train_and_sample(home, output, start.step, "--accept-failed-conversion")


def test_adopted_latents_decode_as_in_the_original_training(shared_data, tmp_path):
    """Sixteen photos, encoded and decoded as the original training does, against the adopted dataset's latents."""
    vae_folder = str(shared_data / "tiny-vae")
    paths = sorted(shared_data.glob("photos/*/*.jpg"))[:16]
    photos = np.stack([np.asarray(Image.open(path).convert("RGB").crop((0, 0, 256, 256))) for path in paths])
    vae = load_vae(vae_folder)
    with torch.no_grad():
        pixels = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
        latents = vae.encode(pixels).latent_dist.mean.bfloat16().contiguous()
        decoded = vae.decode(latents.float()).sample.clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    (tmp_path / "shards").mkdir()
    labels = torch.arange(16, dtype=torch.int16)
    torch.save({"latents": latents, "labels": labels}, tmp_path / "shards/shard_000000.pt")

    manifest = adopted(tmp_path, tmp_path / "shards", vae=vae_folder)
    assert manifest.data.pixel_range == (0, 1)
    store = Store(manifest)
    assert store.valid_rows().tolist() == list(range(16))
    ours = decode(vae, store.read("latents", np.arange(16)), manifest.data.pixel_range)
    expected = psnr(photos, decoded)
    assert psnr(photos, ours) == pytest.approx(expected, abs=0.1)
    washed_out = decode(vae, store.read("latents", np.arange(16)), (-1, 1))
    assert psnr(photos, washed_out) < expected - 5
