"""Weights to sample from: a checkpoint's average, or its linears in FP8 with the scales that were calibrated."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart import checkpoint as checkpoints
from pixart.checkpoint import WEIGHTS, load_tensors
from pixart.model import fp8
from pixart.model.dit import DiT, load_model, own_config
from pixart.model.fp8 import E4M3, INPUT, WEIGHT, Plan

RECORD = "inference.json"
WEIGHT_SCALE, INPUT_SCALE = "weight_scale", "input_scale"


def find(path: str | Path) -> Path:
    """FP8 weights, else the checkpoint that `path` means; ValueError where it is neither."""
    return Path(path) if (Path(path) / RECORD).exists() else checkpoints.find(path)


def load(directory: Path) -> tuple[DiT, dict[str, Any]]:
    """The model, of a checkpoint its average, and a record with `dataset` and `normalization`.

    Raises ValueError for weights that cannot be read.
    """
    if (directory / RECORD).exists():
        record = json.loads((directory / RECORD).read_text())
        return load_fp8(directory, record["linears"]), record
    checkpoint = checkpoints.load(directory)
    return load_model(checkpoint.config, checkpoint.ema).eval(), checkpoints.read_record(directory)


def load_fp8(directory: Path, linears: Sequence[str]) -> DiT:
    """The model with `linears` in FP8."""
    state = load_tensors(directory / WEIGHTS)
    scales = {name: state.pop(f"{name}.{WEIGHT_SCALE}") for name in linears}
    inputs = {name: state.pop(f"{name}.{INPUT_SCALE}") for name in linears}
    weights = {
        name: tensor.float() / scales[name.removesuffix(".weight")] if tensor.dtype == E4M3.dtype else tensor.float()
        for name, tensor in state.items()
    }
    model = load_model(own_config(DiT.load_config(directory)), weights)
    fp8.swap_linears(model, Plan(linears=tuple(linears)))
    for name, module in fp8.float8_linears(model):
        module.scale[INPUT], module.scale[WEIGHT] = inputs[name], scales[name]
    return model.eval()
