"""Exports of a converted checkpoint to other libraries: TransformerEngine, torchao, and FP8 weights for inference.

transformer_engine.safetensors   NAME._extra_state, uint8, of each linear
torchao.json                     the linears to convert; torchao reads the weights in transformer/ by the same names
inference/                       EMA weights: planned linears in E4M3 with NAME.weight_scale and NAME.input_scale,
                                 everything else in BF16; `python -m jobs.launch sample` reads it
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from conversion.export import transformer_engine
from conversion.options import Export
from pixart import records
from pixart.atomic import write_file
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.integrity import list_files
from pixart.checkpoint.lazy_tensors import LazyTensors
from pixart.model.fp8.ops import E4M3, INPUT
from pixart.model.fp8.scaling import scale_from_amax
from pixart.sampling.loading import INFERENCE_FILE, INPUT_SCALE, WEIGHT_SCALE


def export_transformer_engine(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the scales and amax histories as TransformerEngine's extra states."""
    transformer_engine.export(checkpoint.scales, folder / "transformer_engine.safetensors")


def export_torchao(checkpoint: Checkpoint, folder: Path) -> None:
    """Write torchao's recipe name and the names of the planned linears."""
    plan = checkpoint.plan
    assert plan is not None
    recipe = "rowwise" if plan.recipe == "rowwise" else "tensorwise"
    content = {"recipe_name": recipe, "modules": list(plan.linears)}
    write_file(folder / "torchao.json", (json.dumps(content, indent=2) + "\n").encode())


def export_inference(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the EMA weights in FP8.

    Weight scales are computed from the EMA weights; input scales are the calibrated ones.
    """
    plan = checkpoint.plan
    assert plan is not None
    makers: dict[str, Callable[[], Tensor]] = {}
    for name in checkpoint.ema:
        linear, _, kind = name.rpartition(".")
        if linear in plan.linears and kind == "weight":
            makers[name] = partial(fp8_weight, checkpoint, name)
            makers[f"{linear}.{WEIGHT_SCALE}"] = partial(weight_scale, checkpoint, name)
            makers[f"{linear}.{INPUT_SCALE}"] = partial(input_scale, checkpoint, linear)
        else:
            makers[name] = partial(bf16_tensor, checkpoint, name)
    target = folder / "inference"
    checksum = checkpoints.save_weights(LazyTensors(makers), checkpoint.config, target)
    metadata = {
        "linears": list(plan.linears),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "dataset": checkpoint.dataset,
        "provenance": checkpoint.provenance,
        "normalization": dataclasses.asdict(checkpoint.normalization),
        "files": list_files(target, {checkpoints.WEIGHTS: checksum}),
    }
    write_file(target / INFERENCE_FILE, records.dumps(metadata))


def weight_scale(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the E4M3 scale of an EMA weight -> (), float32."""
    return scale_from_amax(checkpoint.ema[name].abs().amax(), torch.ones(()), E4M3.max)


def fp8_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return an EMA weight times its `weight_scale`, in E4M3."""
    scaled = checkpoint.ema[name] * weight_scale(checkpoint, name)
    return scaled.clamp_(-E4M3.max, E4M3.max).to(E4M3.dtype)


def input_scale(checkpoint: Checkpoint, linear: str) -> Tensor:
    """Return the calibrated input scale of a linear -> ()."""
    return checkpoint.scales[f"{linear}.scale"][INPUT].clone()


def bf16_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return an EMA tensor in BF16."""
    return checkpoint.ema[name].bfloat16()


EXPORTS: dict[Export, Callable[[Checkpoint, Path], None]] = {
    "transformer-engine": export_transformer_engine,
    "torchao": export_torchao,
    "inference": export_inference,
}
