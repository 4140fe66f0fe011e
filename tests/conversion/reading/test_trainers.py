"""Checkpoints that the real libraries write: accelerate, diffusers, ema_pytorch, Lightning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.reading import formats
from pixart.checkpoint.directory import Checkpoint
from tests.conversion.reading.test_world import check_same
from tests.support.checkpoints import legacy_content, stage1

ROOT = Path(__file__).parents[3]
LIBRARIES = ROOT / ".venv-trainers"  # apart from those of the suite, which behave differently with accelerate
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def state() -> Checkpoint:
    return stage1.__wrapped__()


@pytest.fixture(scope="module")
def written(state, tmp_path_factory) -> Path:
    """Folder of the checkpoints."""
    if not LIBRARIES.is_dir():
        pytest.skip(f"the libraries are not at {LIBRARIES}: run `make .venv/.installed-dev`")
    folder = tmp_path_factory.mktemp("trainers")
    torch.save(legacy_content(state, prefix=""), folder / "content.pt")
    words = [sys.executable, "-m", "tests.support.trainers", folder, folder / "content.pt"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{LIBRARIES}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["accelerate", "accelerate_bin", "diffusers", "diffusers_state.pt", "ema_pytorch.pt"])
def test_complete_state(written, state, name):
    check_same(formats.read(written / name, base_latent_size=8), state)


@pytest.mark.parametrize(
    "name",
    [
        "accelerate_shards",
        "accelerate_shards/model.safetensors.index.json",
        "diffusers_shards",
        "diffusers/transformer_ema",
        "lightning.ckpt",
        "ema_pytorch_alone.pt",
    ],
)
def test_weights(written, state, name):
    read = formats.read(written / name, base_latent_size=8)
    expected = state.ema if name == "diffusers/transformer_ema" else state.model
    assert read.model.keys() == expected.keys()
    assert all(torch.equal(read.model[key], expected[key]) for key in expected)


def test_lightning_has_its_step_and_lists_the_rest(written):
    read = formats.read(written / "lightning.ckpt", base_latent_size=8)
    assert read.step == 2
    assert {"hyper_parameters", "callbacks", "loops"} <= set(read.provenance["unused_entries"]["names"])
