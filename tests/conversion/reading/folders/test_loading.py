"""Folders and indices of weights in several files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.reading import formats
from conversion.reading.folders import layout
from jobs.state.checkpoint_names import find_weights
from tests.conversion.reading.test_world import check_same
from tests.support.checkpoints import legacy_content


def write_shards(folder: Path, state: dict, end: str = ".safetensors") -> Path:
    """Write weights in two files, and return their index."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(state), {}
    for part, keys in enumerate((names[::2], names[1::2])):
        file = f"{'pytorch_' if end == '.bin' else ''}model-0000{part + 1}-of-00002{end}"
        tensors = {key: state[key].contiguous() for key in keys}
        torch.save(tensors, folder / file) if end == ".bin" else save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(keys, file)
    index = folder / f"{'pytorch_' if end == '.bin' else ''}model{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
def test_weights_in_several_files(stage1, tmp_path, end):
    index = write_shards(tmp_path / "shards", stage1.model, end)
    for path in (index, index.parent):
        read = formats.read(path, base_latent_size=8)
        assert all(torch.equal(read.model[name], stage1.model[name]) for name in stage1.model)
        assert find_weights(str(path)) == (path, None)  # as the launcher finds it, without torch


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda names: {**names, "patchify.weight": "../other.safetensors"}, "is not the name of a file in its folder"),
        (lambda names: {**names, "patchify.weight": "gone.safetensors"}, "'gone.safetensors' is missing"),
        (lambda names: {**names, "other": next(iter(names.values()))}, "'other' is not in model-00001"),
        (lambda names: {key: names[key] for key in list(names)[1:]}, "which the index does not have"),
        (lambda _: [], "is not an index of weights"),
    ],
)
def test_a_damaged_index_is_refused(stage1, tmp_path, change, cause):
    index = write_shards(tmp_path, stage1.model)
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(ValueError, match=cause) as caught:
        formats.read(index)
    assert "\n" not in str(caught.value)


def test_the_trainer_of_transformers(stage1, tmp_path):
    content = legacy_content(stage1, prefix="")
    save_file(content["model"], tmp_path / "model.safetensors")
    torch.save(content["optimizer"], tmp_path / "optimizer.pt")
    torch.save({"last_epoch": 8}, tmp_path / "scheduler.pt")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 8}')
    read = formats.read(tmp_path, base_latent_size=8)
    check_same(read, type(stage1)(**{**{f: getattr(stage1, f) for f in stage1.__slots__}, "ema": stage1.model}))
    assert read.provenance["unused_entries"]["names"] == ["scheduler.pt"]


def test_two_models_of_accelerate_are_refused_and_folders_of_the_suite_are_not_taken(stage1, tmp_path):
    for name in ("model.safetensors", "model_1.safetensors"):
        save_file(stage1.model, tmp_path / name)
    with pytest.raises(ValueError, match="'model' and 'model_1' may both be 'model'"):
        formats.read(tmp_path)
    (tmp_path / "training.json").write_text("{}")
    assert not layout.is_state_folder(tmp_path)
