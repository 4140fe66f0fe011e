"""Checkpoints of the original JAX training, and an environment in which an import of jax fails."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support import equinox_model
from tests.support.equinox_model import BUFFERS, Arrays


@pytest.fixture
def without_jax(monkeypatch):
    for name in ("jax", "jaxlib", "orbax", "equinox"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError


@pytest.fixture
def parameters() -> Arrays:
    return equinox_model.random_parameters()


@pytest.fixture
def ema(parameters) -> Arrays:
    return parameters | {
        name: value + np.float32(1e-3) * np.cos(np.arange(value.size, dtype=np.float32)).reshape(value.shape)
        for name, value in parameters.items()
        if name not in BUFFERS
    }


@pytest.fixture
def step(parameters, ema, tmp_path) -> Path:
    """Step 300 of a checkpoint, in a folder with an older step and a temporary folder."""
    folder = tmp_path / "checkpoints"
    for name in ("90", "301.orbax-checkpoint-tmp"):
        equinox_model.write_step(folder / name, equinox_model.training_state(ema, count=90), None)
    return equinox_model.write_step(folder / "300", equinox_model.training_state(parameters), ema)
