"""Which linears run in FP8, and why the others stay in BF16."""

from torch import nn

from pixart.model.dit import DiT
from pixart.model.fp8 import Plan

ALIGNMENT = 16  # dimensions of an FP8 matrix product must be multiples of it
KEPT = {
    "adaLN": "modulation: its leading dimension is the batch",
    "cross_attention.k_proj": "entry of the text",
    "cross_attention.v_proj": "entry of the text",
    "linear_out": "last layer: its error is the output's",
}


def make_plan(model: DiT, *, history: int = 16, margin: int = 0, batch: int) -> Plan:
    """Every aligned linear of the blocks in FP8, except those in KEPT; `batch` as in `Plan`."""
    linears, kept = [], {"patchify": "entry of the latents"}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = next((why for pattern, why in KEPT.items() if pattern in name), None)
        odd = [size for size in (module.in_features, module.out_features) if size % ALIGNMENT]
        if reason:
            kept[name] = reason
        elif odd:
            kept[name] = f"dimension {odd[0]} is no multiple of {ALIGNMENT}"
        else:
            linears.append(name)
    return Plan(linears=tuple(linears), kept=kept, history=history, margin=margin, batch=batch)
