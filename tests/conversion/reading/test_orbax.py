"""Stage-1 checkpoints of the original JAX training, read while an import of jax would fail."""

import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from conversion.reading import equinox, formats, orbax
from conversion.reading.training_state import LEGACY_SCALE, LEGACY_SHIFT
from jobs.state.checkpoint_names import check_lengths, is_foreign
from pixart.model.dit import DiT, load_model, parameter_groups
from tests.support import equinox_model
from tests.support.equinox_model import BASE_LATENT_SIZE, SIZES, check_output, read, tensors

Q_PROJ = "dit_blocks.0.attention.attention.q_proj.weight"
Q_NORM = "dit_blocks.0.attention.attention.q_norm"
pytestmark = pytest.mark.usefixtures("without_jax")


@torch.no_grad()
def test_outputs_of_the_original_training(shared_data):
    checkpoint = formats.read(shared_data / "jax/stage1/3")
    expected = tensors(dict(np.load(shared_data / "jax/expected.npz")))
    for state, x, output in (("model", "x", "out"), ("model", "x2", "out2"), ("ema", "x", "ema")):
        model, count = load_model(checkpoint.config, getattr(checkpoint, state)), len(expected[x])
        check_output(
            model(expected[x], expected["t"][:count], expected["lab"][:count].long()),
            expected[output],
        )
    for field, name, factor in (("exp_avg", "mu_q0", 2), ("exp_avg_sq", "nu_q0", 4)):
        moment = factor * expected[name][:, equinox.token_channels(64)]
        assert torch.equal(checkpoint.optimizer[f"{Q_PROJ}.{field}"], moment)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (6, 12)])
def test_outputs_equal_those_of_the_jax_model(step, parameters, ema, shape):
    checkpoint = read(step)
    x = torch.randn(3, SIZES["channels"], *shape, generator=torch.Generator().manual_seed(0))
    t, label = torch.tensor([0.1, 0.5, 0.93]), torch.tensor([0, 3, 4])
    for state, arrays in (("model", parameters), ("ema", ema)):
        model = load_model(checkpoint.config, getattr(checkpoint, state))
        check_output(model(x, t, label), equinox_model.velocity(tensors(arrays), x, t, label))


def test_state(step):
    """The folder of all checkpoints stands for its newest step."""
    for path in (step, step.parent):
        checkpoint = read(path)
        assert (checkpoint.stage, checkpoint.step) == (1, 3)
        assert checkpoint.provenance["source"] == str(step)
        assert checkpoint.provenance["source_format"] == "Orbax of the original JAX training"
        assert checkpoint.config["base_image_size"] == BASE_LATENT_SIZE
        assert (checkpoint.config["qk_norm_eps"], checkpoint.config["qk_norm_bias"]) == (1e-5, True)
        assert checkpoint.normalization.pixel_range == (0, 1)
        assert checkpoint.normalization.apply(torch.ones(1, 16, 1, 1))[0, 0] == pytest.approx(
            LEGACY_SCALE - LEGACY_SHIFT
        )
        assert list(checkpoint.provenance["dropped_tensors"].values()) == [SIZES["blocks"]]
        model = DiT(**checkpoint.config)
        model.load_state_dict(checkpoint.model, strict=True)
        names = {
            f"{name}.{field}" for name, _ in model.named_parameters() for field in ("exp_avg", "exp_avg_sq", "step")
        }
        assert checkpoint.optimizer.keys() == names
        assert {float(checkpoint.optimizer[name]) for name in names if name.endswith(".step")} == {3.0}
        assert f"{Q_NORM}.bias" in parameter_groups(model)[1]
    assert formats.read(step).config["base_image_size"] == 32


@pytest.mark.parametrize(("use_ocdbt", "use_zarr3"), [(True, True), (False, False), (False, True)])
def test_other_layouts_of_orbax(step, parameters, tmp_path, use_ocdbt, use_zarr3):
    state = equinox_model.training_state(parameters)
    other = equinox_model.write_step(tmp_path / "7", state, None, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    actual, expected = read(other), read(step)
    for group in ("model", "optimizer"):
        assert getattr(actual, group).keys() == getattr(expected, group).keys()
        assert all(
            torch.equal(tensor, getattr(expected, group)[name]) for name, tensor in getattr(actual, group).items()
        )
    assert torch.equal(actual.ema[Q_PROJ], expected.model[Q_PROJ])  # it has no EMA


def test_norms_without_bias(tmp_path):
    parameters = equinox_model.random_parameters(qk_norm_bias=False)
    checkpoint = read(equinox_model.write_step(tmp_path / "5", equinox_model.training_state(parameters), None))
    assert "qk_norm_bias" not in checkpoint.config
    assert checkpoint.provenance["dropped_tensors"] == {}
    x, t, label = torch.randn(2, SIZES["channels"], 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([1, 4])
    with torch.no_grad():
        actual = load_model(checkpoint.config, checkpoint.model)(x, t, label)
    check_output(actual, equinox_model.velocity(tensors(parameters), x, t, label))


def test_bias_of_zeros_is_kept(parameters, tmp_path):
    for name in parameters:
        if name.endswith("q_norm.bias"):
            parameters[name] = np.zeros_like(parameters[name])
    checkpoint = read(equinox_model.write_step(tmp_path / "5", equinox_model.training_state(parameters), None))
    assert checkpoint.config["qk_norm_bias"] is True
    assert checkpoint.optimizer[f"{Q_NORM}.bias.exp_avg"].abs().min() > 0


def test_bfloat16(parameters, tmp_path):
    rounded = {name: value.astype(ml_dtypes.bfloat16) for name, value in parameters.items()}
    equinox_model.write_item(tmp_path / "item", rounded)
    checkpoint = read(tmp_path / "item")
    expected = tensors(parameters)[Q_PROJ].bfloat16().float()[:, equinox.token_channels(SIZES["dim"])]
    assert torch.equal(checkpoint.model[Q_PROJ], expected)


def test_an_item_alone(step):
    for name, done in (("state", 3), ("model_ema", 0)):
        checkpoint = read(step / name)
        assert checkpoint.step == done
        assert checkpoint.provenance["source_format"].endswith(", weights only") is (name == "model_ema")
        assert torch.equal(checkpoint.model[Q_PROJ], read(step).model[Q_PROJ] if done else read(step).ema[Q_PROJ])
        assert torch.equal(checkpoint.ema[Q_PROJ], checkpoint.model[Q_PROJ])
        assert bool(checkpoint.optimizer[f"{Q_PROJ}.exp_avg"].any()) is (name == "state")


def test_arrays_are_read_one_at_a_time_when_they_are_accessed(step, monkeypatch):
    reads = []
    read_tensor = orbax.read_tensor
    monkeypatch.setattr(orbax, "read_tensor", lambda *words: reads.append(words[1]) or read_tensor(*words))
    checkpoint = read(step)
    assert reads == []
    assert checkpoint.model[Q_PROJ].shape == (SIZES["dim"], SIZES["dim"])
    assert reads == [Q_PROJ]


def test_the_launcher_recognizes_the_checkpoint(step, monkeypatch):
    """Without torch and tensorstore."""
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    for path in (step, step.parent, step / "state"):
        assert is_foreign(path)
        check_lengths(path)
    assert not is_foreign(step.parent.parent)
    manifest = step / "model_ema/manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        check_lengths(step.parent)


def test_a_path_with_dots_spaces_and_percent_signs(step, tmp_path, monkeypatch):
    folder = tmp_path / "a b%20c"
    folder.mkdir()
    shutil.copytree(step, folder / step.name)
    monkeypatch.chdir(folder)
    checkpoint = read(Path("..") / folder.name / step.name)
    assert torch.equal(checkpoint.model[Q_PROJ], read(step).model[Q_PROJ])
