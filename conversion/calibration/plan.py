"""Which linears run in FP8, and why the others stay in BF16."""

from collections.abc import Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from conversion.options import AUTO, STATEFUL, Export, Options, Recipe
from conversion.stage2.reparameterize import stage2_config
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan

ALIGNMENT: dict[Recipe, int] = {"delayed": 16, "current": 16, "rowwise": 16, "mxfp8": 32}  # of a product's dimensions
KEPT = {
    "adaLN": "modulation: its leading dimension is the batch",
    "cross_attention.k_proj": "entry of the text",
    "cross_attention.v_proj": "entry of the text",
    "linear_out": "last layer: its error is the output's",
}


def make_plan(
    model: DiT, *, recipe: Recipe = STATEFUL, keep: Sequence[str] = (), history: int = 16, margin: int = 0, batch: int
) -> Plan:
    """Every aligned linear of the blocks in FP8, except those in KEPT and those that a pattern of `keep` names.

    `batch` as in `Plan`. Raises ValueError for a pattern that names no linear.
    """
    alignment = ALIGNMENT[recipe]
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in keep:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"--keep-bf16 {pattern!r}: the model has no such linear, it has {next(iter(names))} ...")
    linears, kept = [], {"patchify": "entry of the latents"}
    for name, module in names.items():
        reason = next((why for pattern, why in KEPT.items() if pattern in name), None)
        odd = [size for size in (module.in_features, module.out_features) if size % alignment]
        if reason:
            kept[name] = reason
        elif odd:
            kept[name] = f"dimension {odd[0]} is no multiple of {alignment}"
        elif asked := next((pattern for pattern in keep if fnmatch(name, pattern)), None):
            kept[name] = f"asked for by {asked}"
        else:
            linears.append(name)
    return Plan(linears=tuple(linears), kept=kept, recipe=recipe, history=history, margin=margin, batch=batch)


def plan_by_rule(start: Checkpoint, options: Options, text_dim: int) -> Plan:
    """Before anything is measured. Raises ValueError for patterns and exports that do not fit the model."""
    config = start.config
    if start.stage < options.stage:
        config = stage2_config(config, text_dim)
    with torch.device("meta"):
        model = DiT(**config)
    patterns = [pattern for pattern in options.keep_bf16 if pattern != AUTO]
    sizes = {name: getattr(options, name) for name in ("recipe", "history", "margin", "batch")}
    plan = make_plan(model, keep=patterns, **sizes)
    check_exports(options.exports, plan)
    return plan


def check_exports(names: Sequence[Export], plan: Plan) -> None:
    """Raises ValueError for an export that needs scales where the recipe keeps none."""
    stateless = plan.recipe != STATEFUL
    for name in names:
        if stateless and name != "torchao":
            raise ValueError(f"--export {name} needs scales, which the recipe {plan.recipe} does not keep")
