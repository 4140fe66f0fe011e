"""Choice of the linears that run in FP8, with the reason for each one that stays in BF16."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from conversion.options import AUTO, STATEFUL, Export, Options, Recipe
from conversion.stage2.reparameterize import stage2_config
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan

ALIGNMENT: dict[Recipe, int] = {"delayed": 16, "current": 16, "rowwise": 16, "mxfp8": 32}  # of the GEMM dimensions
KEPT_IN_BF16 = {
    "adaLN": "modulation, whose leading dimension is the batch",
    "cross_attention.k_proj": "text entry projection",
    "cross_attention.v_proj": "text entry projection",
    "linear_out": "output layer, whose error is the output's error",
}


def make_plan(
    model: DiT,
    *,
    recipe: Recipe = STATEFUL,
    keep: Sequence[str] = (),
    last_blocks: int = 0,
    history: int = 16,
    margin: int = 0,
    batch: int,
) -> Plan:
    """Plan FP8 for every aligned linear.

    Those in KEPT_IN_BF16, those that match a pattern of `keep`, and those of the `last_blocks` blocks are left out. The
    other arguments are fields of `Plan`. Raises ValueError for a pattern that matches no linear, and for more blocks
    than the model has.
    """
    alignment = ALIGNMENT[recipe]
    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    blocks = len({name.split(".")[1] for name in modules if name.startswith("dit_blocks.")})
    if last_blocks > blocks:
        raise ValueError(
            f"--last-blocks-bf16 {last_blocks}: the model has {blocks} blocks; allowed are numbers up to {blocks}"
        )
    last = tuple(f"dit_blocks.{index}." for index in range(blocks - last_blocks, blocks))
    for pattern in keep:
        if not any(fnmatch(name, pattern) for name in modules):
            raise ValueError(
                f"--keep-bf16 {pattern!r}: matches no linear of the model; names are such as {next(iter(modules))}"
            )
    linears, kept = [], {"patchify": "latent entry projection"}
    for name, module in modules.items():
        reason = next((reason for part, reason in KEPT_IN_BF16.items() if part in name), None)
        unaligned = [size for size in (module.in_features, module.out_features) if size % alignment]
        if reason:
            kept[name] = reason
        elif unaligned:
            kept[name] = f"dimension {unaligned[0]} is not a multiple of {alignment}"
        elif match := next((pattern for pattern in keep if fnmatch(name, pattern)), None):
            kept[name] = f"matches --keep-bf16 {match}"
        elif name.startswith(last):
            kept[name] = f"in one of the last blocks, --last-blocks-bf16 {last_blocks}"
        else:
            linears.append(name)
    return Plan(linears=tuple(linears), kept=kept, recipe=recipe, history=history, margin=margin, batch=batch)


def plan_from_options(start: Checkpoint, options: Options, text_dim: int) -> Plan:
    """Plan FP8 for the converted model from its shapes and the options, before anything is measured.

    Raises ValueError for patterns and exports that do not fit the model.
    """
    config = start.config
    if start.stage < options.stage:
        config = stage2_config(config, text_dim)
    with torch.device("meta"):
        model = DiT(**config)
    plan = make_plan(
        model,
        recipe=options.fp8_recipe,
        keep=[pattern for pattern in options.keep_bf16 if pattern != AUTO],
        last_blocks=options.last_blocks_bf16,
        history=options.amax_history_len,
        margin=options.margin,
        batch=options.batch_size,
    )
    check_exports(options.exports, plan, config)
    return plan


def check_exports(names: Sequence[Export], plan: Plan, config: Mapping[str, Any]) -> None:
    """Raise ValueError for an export that needs scales if the plan's recipe stores none.

    TransformerEngine is also refused for a model whose norms of queries have a bias.
    """
    stateless = plan.recipe != STATEFUL
    for name in names:
        if stateless and name != "torchao":
            raise ValueError(f"--export {name}: needs stored scales; --fp8-recipe {plan.recipe} stores none")
        if name == "transformer-engine" and config.get("qk_norm_bias"):
            raise ValueError(
                f"--export {name}: the model's norms of queries have a bias, which TransformerEngine's RMSNorm cannot "
                "have; allowed are torchao and inference"
            )
