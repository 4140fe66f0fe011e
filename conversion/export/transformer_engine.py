"""Scales as TransformerEngine 2 keeps them: a linear's `_extra_state`, written without the library and without a GPU.

It is a pickle in a uint8 tensor, which the library reads only with NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1. Without a
recipe of its own it becomes a default DelayedScaling, whose amax history has 1024 rows; row 0 is the current step's.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.safetensors_stream import save_tensors
from pixart.model.fp8.ops import GRAD_OUTPUT, INPUT, WEIGHT

HISTORY = 1024
FORWARD = (INPUT, WEIGHT)  # and the output, which has no scale of its own here
BACKWARD = (GRAD_OUTPUT,)  # and the gradient of the input, likewise


def extra_state(scale: Tensor, amax_history: Tensor) -> Tensor:
    """Of a linear with `scale` (3,) and `amax_history` (rows, 3), by slot -> (bytes,), uint8."""
    state: dict[str, object] = {"extra_fp8_variables": {"num_gemms": 1}}
    for way, slots in (("fwd", FORWARD), ("bwd", BACKWARD)):
        scales, history = torch.ones(len(slots) + 1), torch.zeros(HISTORY, len(slots) + 1)
        scales[:-1] = scale[list(slots)]
        history[1:, :-1] = amax_history[:, list(slots)].amax(0)
        state |= {f"scale_{way}": scales, f"amax_history_{way}": history}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def export(scales: State, path: Path) -> None:
    """Writes `NAME._extra_state` of every linear that `scales` has as `NAME.scale` and `NAME.amax_history`."""
    linears = [key.removesuffix(".scale") for key in scales if key.endswith(".scale")]
    makers = {
        f"{name}._extra_state": lambda name=name: extra_state(scales[f"{name}.scale"], scales[f"{name}.amax_history"])
        for name in linears
    }
    save_tensors(LazyTensors(makers), path)
