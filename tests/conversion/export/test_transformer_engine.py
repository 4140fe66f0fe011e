import pickle
import pickletools

import pytest
import torch
from safetensors.torch import load_file

from conversion.export.transformer_engine import AMAX_HISTORY_LEN, export, extra_state
from pixart.model.fp8.plan import Plan
from pixart.model.fp8.scaling import calibrated_state

NAMES = ("dit_blocks.0.mlp.linear1", "dit_blocks.0.mlp.linear2")
AMAX = {NAMES[0]: torch.tensor([3.0, 0.5, 1e-4]), NAMES[1]: torch.tensor([7.0, 0.25, 0.0])}


def test_every_slot_has_its_scale_and_history(tmp_path):
    scales = calibrated_state(AMAX, Plan(linears=NAMES, history=16))
    export(scales, tmp_path / "te.safetensors")
    blobs = load_file(tmp_path / "te.safetensors")
    assert set(blobs) == {f"{name}._extra_state" for name in NAMES}
    for name in NAMES:
        blob = blobs[f"{name}._extra_state"]
        assert blob.dtype == torch.uint8
        state = pickle.loads(blob.numpy().tobytes())
        input_scale, weight_scale, grad_scale = scales[f"{name}.scale"].tolist()
        assert state["scale_fwd"].tolist() == [input_scale, weight_scale, 1]
        assert state["scale_bwd"].tolist() == [grad_scale, 1]
        for direction, amax in (("fwd", [*AMAX[name][:2].tolist(), 0]), ("bwd", [AMAX[name][2].item(), 0])):
            history = state[f"amax_history_{direction}"]
            assert history.shape == (AMAX_HISTORY_LEN, len(amax))
            assert (history[0] == 0).all()  # row of the current step
            assert history[1:].amax(0).tolist() == history[1:].amin(0).tolist() == pytest.approx(amax)
        assert state["extra_fp8_variables"] == {"num_gemms": 1}
        assert set(state) == {"scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd", "extra_fp8_variables"}


def test_pickle_imports_only_tensor_constructors():
    blob = extra_state(torch.ones(3), torch.zeros(16, 3)).numpy().tobytes()
    words = [value for _, value, _ in pickletools.genops(blob) if isinstance(value, str)]
    modules = {word for word in words if word.split(".")[0] in {"torch", "collections", "builtins", "os", "posix"}}
    assert modules == {"torch._utils", "torch.storage", "collections"}


def test_exported_history_is_the_maximum_over_rows():
    history = torch.zeros(4, 3)
    history[1], history[3] = 5.0, 2.0
    state = pickle.loads(extra_state(torch.full((3,), 89.6), history).numpy().tobytes())
    assert state["amax_history_fwd"].amax(0).tolist() == [5, 5, 0]
