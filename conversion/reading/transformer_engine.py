"""Files of the original training with TransformerEngine: extra states, the norm of queries and keys, and layouts.

They have the parameters of a BF16 file, and an entry NAME._extra_state for each module of the library. An extra state
is the state of FP8 scaling: a uint8 tensor, empty with MXFP8 and a pickle with delayed scaling; older versions of the
library store an `io.BytesIO` or None. It holds no parameter, so it is skipped, and never unpickled.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pixart.model.dit import state_shapes

EXTRA_STATE = "_extra_state"
QK_NORM_EPS = 1e-5  # default of `transformer_engine.pytorch.RMSNorm`; `torch.nn.RMSNorm` takes 1.19e-7 in float32
MINIMAL_SIZES = dict.fromkeys(("in_dim", "num_heads", "mlp_ratio", "num_blocks", "patch_size", "base_image_size"), 1)


def is_extra_state(key: str) -> bool:
    """Return whether a key of a state dictionary is that of an extra state."""
    return key.rpartition(".")[2] == EXTRA_STATE


def without_extra_states(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state dictionary that are no extra states."""
    return {key: value for key, value in state.items() if not is_extra_state(key)}


def check_layout(names: Iterable[str], path: Path) -> None:
    """Raise ValueError if a parameter is not one of the original's models, as those of fused modules are not."""
    for name in names:
        if re.sub(r"^dit_blocks\.\d+\.", "dit_blocks.0.", name) not in parameter_names():
            raise ValueError(
                f"{path}: {name} is not a parameter of the original training with TransformerEngine; only models of "
                "te.Linear, te.RMSNorm and te.DotProductAttention are read, not fused modules such as "
                "te.LayerNormLinear, te.LayerNormMLP and te.TransformerLayer"
            )


@functools.cache
def parameter_names() -> frozenset[str]:
    """Return the names of the tensors of both stages, for a model of one block."""
    sizes = {**MINIMAL_SIZES, "dim": 4, "cond_dim": 4}
    return frozenset(state_shapes({**sizes, "num_classes": 1}) | state_shapes({**sizes, "text_dim": 1}))
