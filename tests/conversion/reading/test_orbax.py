"""Stage-1 checkpoints of the original JAX training, read while an import of jax would fail."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from conversion.options import Options
from conversion.reading import equinox, formats, orbax
from conversion.reading.training_state import LEGACY_SCALE, LEGACY_SHIFT
from conversion.report.text import describe
from conversion.to_fp8 import convert, main
from jobs.state.checkpoint_names import check_lengths, is_foreign
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.config.recipe import Recipe, to_json
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.model.dit import DiT, load_model, parameter_groups
from pixart.training.loop import train
from pixart.training.metrics import NullReporter
from pixart.training.optimizer import make_optimizer, optimizer_tensors
from tests.conversion.reading.test_damaged import fingerprint
from tests.support import equinox_model
from tests.support.equinox_model import BASE_LATENT_SIZE, BUFFERS, COUNT, MU, NU, SIZES, Arrays

Q_PROJ, Q_NORM = (f"dit_blocks.0.attention.attention.{name}" for name in ("q_proj.weight", "q_norm"))
LR, WEIGHT_DECAY, BETAS, EPS = 1e-4, 0.03, (0.9, 0.999), 1e-15  # as in the original training


@pytest.fixture(autouse=True)
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


def read(path: Path) -> Checkpoint:
    return formats.read(path, base_latent_size=BASE_LATENT_SIZE)


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def check_output(actual: Tensor, expected: Tensor) -> None:
    rms = expected.square().mean().sqrt()
    assert float((actual - expected).abs().max() / rms) < 1e-4
    assert float((actual - expected).square().mean().sqrt() / rms) < 1e-5


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


def adamw(weight: np.ndarray, grad: np.ndarray, mu: np.ndarray, nu: np.ndarray, step: int, decay: float) -> np.ndarray:
    """Return a weight after one step of optax.adamw, in float64."""
    weight, grad, mu, nu = (np.asarray(value, np.float64) for value in (weight, grad, mu, nu))
    mu = (BETAS[0] * mu + (1 - BETAS[0]) * grad) / (1 - BETAS[0] ** step)
    nu = (BETAS[1] * nu + (1 - BETAS[1]) * grad**2) / (1 - BETAS[1] ** step)
    return weight - LR * (mu / (np.sqrt(nu) + EPS) + decay * weight)


def check_next_step(checkpoint: Checkpoint, state: Arrays, loss_inputs: tuple[Tensor, Tensor, Tensor], **sizes: int):
    """Compare a step of this suite's optimizer with one of the JAX training.

    AdamW's step does not depend on the scale of a parameter: where this suite's is larger, its step is not. The JAX
    training also decays biases and norms, this suite does not, so that they are compared without decay.
    """
    x, t, label = loss_inputs
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    model = load_model(checkpoint.config, {name: tensor.clone() for name, tensor in checkpoint.model.items()})
    config = {"lr": LR, "weight_decay": WEIGHT_DECAY, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS}
    optimizer = make_optimizer(model, TrainConfig(steps=99, global_batch_size=4, warmup_steps=0, **config))
    for name, tensor in optimizer_tensors(optimizer, model).items():
        tensor.copy_(checkpoint.optimizer[name])
    (model(x, t, label) - target).square().mean().backward()
    optimizer.step()

    leaves = tensors({name[2:]: value for name, value in state.items() if name.startswith("0.")})
    trained = {name: tensor.requires_grad_() for name, tensor in leaves.items() if name not in BUFFERS}
    loss = (equinox_model.velocity(leaves, x, t, label, **sizes) - target).square().mean() / 2
    grads = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    decayed = set(parameter_groups(model)[0])
    compared = 0
    for name, leaf in trained.items():
        if equinox.is_dropped(name):
            assert float(grads[name].abs().max()) < 1e-6  # softmax does not see it
            continue
        before, moments = leaf.detach().numpy(), (state[f"{MU}.{name}"], state[f"{NU}.{name}"])
        decay = WEIGHT_DECAY if name in decayed else 0.0
        after = adamw(before, grads[name].numpy(), *moments, int(state[COUNT]) + 1, decay)
        change = equinox.reorder(name, torch.from_numpy(after - before), checkpoint.config).float()
        expected = checkpoint.model[name] + change
        assert torch.allclose(model.get_parameter(name), expected, rtol=1e-6, atol=LR * 1e-3), name
        assert float(change.abs().max()) > LR / 10, name
        compared += 1
    assert compared == len(list(model.parameters()))


def test_next_step_equals_that_of_the_jax_training(step, parameters):
    x = torch.randn(4, SIZES["channels"], 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = (x, torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 4]))
    check_next_step(read(step), equinox_model.training_state(parameters), inputs)


def test_next_step_of_the_original_training(shared_data):
    folder = shared_data / "jax/stage1/3"
    expected = tensors(dict(np.load(shared_data / "jax/expected.npz")))
    item = orbax.read_items(folder)[0]
    state = {name: np.array(array.read().result()) for name, array in orbax.open_arrays(item).items()}
    inputs = (expected["x"], expected["t"], expected["lab"].long())
    check_next_step(formats.read(folder), state, inputs, heads=4, base_latent_size=32)


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


def test_missing_tensorstore_is_named_with_the_command_that_installs_it(step, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert 'pip install "pixart-suite[jax-checkpoints]"' in refusal(step, capsys)


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


def refusal(path: Path, capsys: pytest.CaptureFixture) -> str:
    """Convert `path`; return the error, after checking that it is one line and that nothing was written."""
    before = fingerprint(path.parents[1])
    capsys.readouterr()
    words = ["--num-batches", "1", "--batch-size", "2", "--text-dim", "16", "--stage", "1", "--base-latent-size", "8"]
    assert main([str(path), *words, "--output", str(path.parents[1] / "written")]) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert fingerprint(path.parents[1]) == before
    return line


def rewrite(step: Path, change: Callable[[Arrays], Any], item: str = "state", **layout: bool) -> None:
    """Write an item of a step again, with its arrays changed."""
    original = orbax.read_items(step)[item == "model_ema"]
    assert original is not None
    arrays = {name: np.array(array.read().result()) for name, array in orbax.open_arrays(original).items()}
    change(arrays)
    (step / item).rename(step.parents[1] / "original")
    equinox_model.write_item(step / item, arrays, **layout)


def change_metadata(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = step / "state/_METADATA"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(step: Path, fraction: float) -> None:
    """Truncate every data file; in some, the end has earlier versions of the database, which nothing refers to."""
    for file in (step / "state/d").iterdir():
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])


def rename_array(content: dict[str, Any], keys: list[Any]) -> None:
    entry = next(entry for key, entry in content["tree_metadata"].items() if "q_proj" in key)
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]


def link(path: Path, target: Path | str) -> None:
    if path.is_dir():
        path.rename(path.parents[2] / "moved")
        target = path.parents[2] / "moved"
    else:
        path.unlink()
    path.symlink_to(target)


def remove_chunk(step: Path) -> None:
    """Remove the only chunk of an array, which the format reads as zeros."""
    rewrite(step, lambda arrays: None, use_ocdbt=False)
    (step / f"state/0.{Q_PROJ}/0.0").unlink()


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no metadata": ("_METADATA: is missing", lambda step: (step / "state/_METADATA").unlink()),
    "metadata of an item is no JSON": ("as JSON", lambda step: (step / "state/_METADATA").write_text("{")),
    "metadata is nested deeply": ("as JSON", lambda step: (step / "state/_METADATA").write_text("[" * 100_000)),
    "metadata is a list": ("JSON object", lambda step: (step / "state/_METADATA").write_text("[]")),
    "metadata of the step is no JSON": ("as JSON", lambda step: (step / "_CHECKPOINT_METADATA").write_text("\0")),
    "no tree": ("tree_metadata", lambda step: change_metadata(step, lambda content: content.pop("tree_metadata"))),
    "empty tree": ("no weights", lambda step: change_metadata(step, lambda content: content["tree_metadata"].clear())),
    "tree of numbers": ("names an array", lambda step: change_metadata(step, lambda c: c["tree_metadata"].update(a=3))),
    **{
        f"array named {'.'.join(map(str, keys))[:20]!r}": (
            "names an array",
            lambda step, keys=keys: change_metadata(step, lambda content: rename_array(content, keys)),
        )
        for keys in (
            ["..", "..", "passwd"],
            ["0", "/etc/passwd"],
            ["0", ""],
            ["0", "a\0b"],
            [],
            [{"a": 1}],
            ["0", "a/../b"],
        )
    },
    "array named twice": (
        "twice",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["0", "adaLN1", "bias"])),
    ),
    "array of no model": (
        "allowed are",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["2", "x"])),
    ),
    "array that is not stored": (
        "cannot be read",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["0", "x"])),
    ),
    "no EMA": ("model_ema: is missing", lambda step: (step / "model_ema").rename(step.parents[1] / "moved")),
    "no state": ("state: is missing", lambda step: (step / "state").rename(step.parents[1] / "moved")),
    "state is a link": ("symbolic link", lambda step: link(step / "state", "")),
    "metadata is a link": ("symbolic link", lambda step: link(step / "state/_METADATA", "/dev/zero")),
    "data is a link": (
        "symbolic link",
        lambda step: link(next((step / "state/d").iterdir()), "/etc/hostname"),
    ),
    "data is a pipe": ("neither a file", lambda step: os.mkfifo(step / "state/d/pipe")),
    "no manifest": ("truncated", lambda step: (step / "state/manifest.ocdbt").unlink()),
    "empty manifest": ("truncated", lambda step: (step / "state/manifest.ocdbt").write_bytes(b"")),
    "manifest of zeros": ("truncated", lambda step: (step / "state/manifest.ocdbt").write_bytes(bytes(200))),
    **{
        f"data truncated to {fraction:.0%}": ("cannot be read", lambda step, f=fraction: truncate(step, f))
        for fraction in (0, 0.3, 0.8, 0.999)
    },
    "missing chunk": ("cannot be read", remove_chunk),
    "no weights": (
        "no weights",
        lambda step: rewrite(step, lambda a: [a.pop(name) for name in list(a) if name.startswith("0.")]),
    ),
    "no count": ("no array 1.1.0.count", lambda step: rewrite(step, lambda arrays: arrays.pop(COUNT))),
    "negative count": ("steps", lambda step: rewrite(step, lambda arrays: arrays.update({COUNT: np.int32(-1)}))),
    "count is a vector": ("steps", lambda step: rewrite(step, lambda a: a.update({COUNT: zeros(2, dtype="int32")}))),
    "missing weight": ("lack 1", lambda step: rewrite(step, lambda arrays: arrays.pop(f"0.{Q_NORM}.bias"))),
    "missing moment": ("lack 1", lambda step: rewrite(step, lambda arrays: arrays.pop(f"{MU}.{Q_PROJ}"))),
    "unknown weight": ("adapter", lambda step: rewrite(step, lambda a: a.update({"0.adapter.weight": zeros(2)}))),
    "other optimizer": ("1.0.trace", lambda step: rewrite(step, lambda a: a.update({"1.0.trace.x": zeros(2)}))),
    "other shape": ("shape", lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 31)}))),
    "other shape of a moment": ("shape", lambda step: rewrite(step, lambda a: a.update({f"{NU}.{Q_PROJ}": zeros(32)}))),
    "other shape of the EMA": (
        "shape",
        lambda step: rewrite(step, lambda arrays: arrays.update({Q_PROJ: zeros(1, 32)}), "model_ema"),
    ),
    "dimension of 34": ("stage-1 model", lambda step: rewrite(step, lambda a: a.update(narrow(a)))),
    "integers": (
        "int32",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="int32")})),
    ),
    "float16": (
        "float16",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="float16")})),
    ),
    "complex": (
        "complex64",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="complex64")})),
    ),
    "not a number": ("NaN", lambda step: rewrite(step, lambda a: a[f"0.{Q_PROJ}"].fill(np.nan))),
    "negative second moment": ("negative", lambda step: rewrite(step, lambda a: a[f"{NU}.{Q_PROJ}"].fill(-1))),
    "huge shape": ("claim", lambda step: claim(step, {"shape": [1 << 30, 1 << 30], "chunks": [32, 32]})),
    "huge chunk": ("chunks", lambda step: claim(step, {"chunks": [1 << 30, 1 << 30]})),
    "stage 2": (
        "never validated",
        lambda step: rewrite(step, lambda a: a.update({"0.adaLN1_single.weight": zeros(32, 16)})),
    ),
}


def narrow(arrays: Arrays) -> Arrays:
    """Return the first convolution of a model whose dimension is no multiple of 4."""
    weight = arrays["0.patchify.weight"]
    return {"0.patchify.weight": np.concatenate([weight, weight[:2]])}


def claim(step: Path, metadata: dict[str, Any]) -> None:
    """Change the metadata of an array, in a checkpoint without OCDBT."""
    rewrite(step, lambda arrays: None, use_ocdbt=False)
    path = step / f"state/0.{Q_PROJ}/.zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **metadata}))


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_refused(step, capsys, name):
    message, damage = DAMAGES[name]
    damage(step)
    line = refusal(step, capsys)
    assert message in line
    assert str(step) in line


def test_stage_2_under_another_name_is_refused(tmp_path, capsys):
    """The JAX re-parameterization saved its result as the item `model` of step 0."""
    arrays = {"patchify.weight": zeros(32, 16, 2, 2), "dit_blocks.0.cross_attention.q_proj.weight": zeros(32, 32)}
    equinox_model.write_item(tmp_path / "new/0/model", arrays)
    (tmp_path / "new/0/_CHECKPOINT_METADATA").write_text("{}")
    for path in (tmp_path / "new", tmp_path / "new/0", tmp_path / "new/0/model"):
        assert "never validated" in refusal(path / ".", capsys)


def test_export_for_transformer_engine_is_refused(step, tmp_path):
    with pytest.raises(ValueError, match=r"--export transformer-engine: .* bias"):
        convert(step, tmp_path / "out", Options(base_latent_size=8, exports=("transformer-engine",)))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dataset(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of a dataset of pixels in [0, 1], as those of the original training."""
    from jobs.tasks import caption, init_dataset, latents

    path = str(tmp_path_factory.mktemp("dataset") / "pixels")
    data = dataclasses.replace(small_recipe.data, path=path, pixel_range=(0, 1))
    recipe = dataclasses.replace(small_recipe, data=data)
    init_dataset.run(to_json(recipe))
    shards = list(range(data.num_shards))
    caption.run(path, shards)
    latents.run(path, shards)
    return recipe


def test_conversion_passes_its_acceptance_checks_and_trains_in_fp8(step, dataset, tmp_path):
    options = Options(
        num_batches=4, batch_size=16, text_dim=manifests.read(dataset.data.path).text_dim, base_latent_size=8
    )
    report = convert(step, tmp_path / "converted", options)
    assert report["acceptance"]["passed"], report["acceptance"]
    assert report["calibration_data"].startswith("synthetic")
    assert report["dropped_tensors"] == {equinox.DROPPED_REASON: SIZES["blocks"]}
    assert f"dropped     {SIZES['blocks']} k_norm.bias" in describe(report)
    assert "k_norm.bias" in (tmp_path / "converted/report.html").read_text()
    provenance = report["tensor_provenance"]
    assert provenance[f"{Q_NORM}.bias"] == "carried"
    assert provenance["dit_blocks.0.cross_attention.q_norm.bias"] == "new"
    assert not any("k_norm.bias" in name for name in provenance)
    source, start = read(step), checkpoints.load(tmp_path / "converted")
    for name in (f"{Q_NORM}.bias.exp_avg", f"{Q_NORM}.bias.exp_avg_sq", f"{Q_NORM}.bias.step"):
        assert torch.equal(start.optimizer[name], source.optimizer[name])
    assert not start.model["dit_blocks.0.cross_attention.q_norm.bias"].any()
    assert start.normalization == source.normalization

    last = train(
        stage=2,
        model=dataset.model,
        config=dataset.stage2,
        dataset=dataset.data.path,
        run=tmp_path / "run",
        start=tmp_path / "converted",
        reporter=NullReporter(),
    )
    end = checkpoints.load(last)
    assert (end.step, end.plan is None) == (dataset.stage2.steps, False)
    for name in (f"{Q_NORM}.bias", "dit_blocks.0.cross_attention.q_norm.bias"):
        assert torch.isfinite(end.model[name]).all()
        assert not torch.equal(end.model[name], start.model[name]), name
    assert float(end.optimizer[f"{Q_NORM}.bias.step"]) == source.step + end.step


def test_dataset_of_another_pixel_range_is_refused(step, small_recipe, tmp_path):
    options = Options(calibration_dataset=small_recipe.data.path, base_latent_size=8)
    with pytest.raises(ValueError, match=r"data\.pixel_range"):
        convert(step, tmp_path / "out", options)


@pytest.mark.slow
def test_conversion_of_the_original_training(shared_data, tmp_path):
    """Three steps after a random initialization, no modulation of stage 2 fits; the stage is kept."""
    report = convert(shared_data / "jax/stage1", tmp_path / "out", Options(stage=1))
    assert report["acceptance"]["passed"], report["acceptance"]
    assert report["source"] == str(shared_data / "jax/stage1/3")
    expected = tensors(dict(np.load(shared_data / "jax/expected.npz")))
    for folder, output in (("transformer", "out"), ("ema", "ema")):
        model = DiT.from_pretrained(tmp_path / "out" / folder)
        with torch.no_grad():
            check_output(model(expected["x"], expected["t"], expected["lab"].long()), expected[output])
