"""Export of scales as TransformerEngine 2 stores them: the `_extra_state` of each linear.

The state is a pickle in a uint8 tensor, written here without the library and without a GPU; the library loads it only
if NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1. The pickle names no recipe, so that the library takes its default
DelayedScaling, whose amax history has 1024 rows; row 0 holds the current step's amax.
"""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.safetensors_stream import save_tensors
from pixart.model.fp8.ops import GRAD_OUTPUT, INPUT, WEIGHT

AMAX_HISTORY_LEN = 1024
FORWARD_SLOTS = (INPUT, WEIGHT)  # followed by the output, which has no scale in this suite
BACKWARD_SLOTS = (GRAD_OUTPUT,)  # followed by grad_input, which has none either


def extra_state(scale: Tensor, amax_history: Tensor) -> Tensor:
    """Serialize `scale` (3,) and `amax_history` (rows, 3) of a linear, both by slot -> (bytes,), uint8."""
    state: dict[str, object] = {"extra_fp8_variables": {"num_gemms": 1}}
    for direction, slots in (("fwd", FORWARD_SLOTS), ("bwd", BACKWARD_SLOTS)):
        scales, history = torch.ones(len(slots) + 1), torch.zeros(AMAX_HISTORY_LEN, len(slots) + 1)
        scales[:-1] = scale[list(slots)]
        history[1:, :-1] = amax_history[:, list(slots)].amax(0)
        state |= {f"scale_{direction}": scales, f"amax_history_{direction}": history}
    return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)


def export(scales: State, path: Path) -> None:
    """Write NAME._extra_state for every linear that has NAME.scale and NAME.amax_history in `scales`."""
    linears = [key.removesuffix(".scale") for key in scales if key.endswith(".scale")]
    makers = {
        f"{name}._extra_state": lambda name=name: extra_state(scales[f"{name}.scale"], scales[f"{name}.amax_history"])
        for name in linears
    }
    save_tensors(LazyTensors(makers), path)
