import json

import pytest
import torch
from safetensors.torch import load_file

from pixart import records
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.checkpoint.safetensors_stream import save_tensors
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan

CONFIG = {
    "in_dim": 4,
    "dim": 16,
    "cond_dim": 8,
    "num_heads": 2,
    "num_blocks": 1,
    "base_image_size": 8,
    "num_classes": 3,
}


def make_checkpoint(step: int = 7) -> Checkpoint:
    torch.manual_seed(step)
    model = DiT(**CONFIG)
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint(
        stage=1,
        step=step,
        config={**CONFIG, "mlp_ratio": 4, "patch_size": 2, "text_dim": None},
        model=state,
        ema={name: tensor * 0.5 for name, tensor in state.items()},
        optimizer={"patchify.weight.exp_avg": torch.randn(16, 4, 2, 2)},
        normalization=Normalization(mean=(0.1, 0.2, 0.3, 0.4), std=(1.0, 2.0, 3.0, 4.0)),
        plan=Plan(linears=("dit_blocks.0.mlp.linear1",), kept={"patchify": "entry"}, history=8),
        scales={"dit_blocks.0.mlp.linear1.scale": torch.tensor([1.0, 2.0, 3.0])},
        dataset="/data",
        provenance={"source": "elsewhere"},
    )


def test_round_trip_is_exact(tmp_path):
    saved = make_checkpoint()
    loaded = checkpoints.load(checkpoints.save(saved, tmp_path / "step-00000007"))
    for field in ("stage", "step", "normalization", "plan", "dataset", "provenance", "config"):
        assert getattr(loaded, field) == getattr(saved, field), field
    for field in ("model", "ema", "optimizer", "scales"):
        actual, expected = getattr(loaded, field), getattr(saved, field)
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[key], expected[key]) for key in actual)


def test_weights_are_a_diffusers_folder(tmp_path):
    saved = make_checkpoint()
    checkpoints.save(saved, tmp_path / "c")
    model = DiT.from_pretrained(tmp_path / "c" / "transformer", low_cpu_mem_usage=False)
    assert torch.equal(model.patchify.weight, saved.model["patchify.weight"])


def test_a_failed_save_keeps_the_previous_checkpoint_only(tmp_path):
    checkpoints.save(make_checkpoint(1), tmp_path / "c")
    broken = make_checkpoint(2)
    broken.provenance = {"not json": object()}
    with pytest.raises(TypeError):
        checkpoints.save(broken, tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert checkpoints.load(tmp_path / "c").step == 1
    checkpoints.save(make_checkpoint(3), tmp_path / "c")
    assert checkpoints.load(tmp_path / "c").step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_find_returns_the_newest_complete_checkpoint(tmp_path):
    for step in (3, 12, 7):
        checkpoints.save(make_checkpoint(step), tmp_path / "checkpoints" / f"step-{step:08d}")
    (tmp_path / "checkpoints" / "step-00000020").mkdir()  # incomplete: no marker
    checkpoints.save(make_checkpoint(12), tmp_path / "checkpoints" / "step-00000012.fp8")  # converted, not of the run
    assert checkpoints.find(tmp_path).name == "step-00000012"
    assert checkpoints.find(tmp_path / "checkpoints/step-00000003").name == "step-00000003"
    with pytest.raises(ValueError, match="neither"):
        checkpoints.find(tmp_path / "nothing")


def test_errors_of_damaged_checkpoints(tmp_path):
    directory = checkpoints.save(make_checkpoint(), tmp_path / "c")
    weights = directory / "transformer" / checkpoints.WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="truncated"):
        checkpoints.load(directory)
    state = load_file(directory / "ema" / checkpoints.WEIGHTS)
    for changed, message in (
        ({**state, "patchify.bias": torch.zeros(3)}, r"patchify.bias has shape \(3,\)"),
        ({**state, "extra": torch.zeros(3)}, "extra"),
        ({key: value for key, value in state.items() if key != "patchify.bias"}, "lacks 1 tensors"),
    ):
        save_tensors(changed, weights)
        with pytest.raises(ValueError, match=message):
            checkpoints.load(directory, verify=False)
    metadata = checkpoints.read_metadata(directory)
    for changed in (
        {"normalization": {"unknown": [0.0]}},
        {"plan": {"linears": [], "blocks": 3}},
        {"plan": {"recipe": "delayed"}},
    ):
        (directory / "training.json").write_bytes(records.dumps({**metadata, **changed}))
        with pytest.raises(ValueError, match="of another version"):
            checkpoints.load_without_tensors(directory)
    (directory / "training.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="99"):
        checkpoints.load(directory)
    (directory / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training\.json"):
        checkpoints.load(directory)


def test_normalization_round_trip():
    normalization = make_checkpoint().normalization
    latents = torch.randn(2, 4, 3, 3)
    normalized = normalization.apply(latents)
    assert torch.allclose(normalized[:, 1], (latents[:, 1] - 0.2) / 2)
    assert torch.allclose(normalization.undo(normalized), latents, atol=1e-6)
