"""Re-parameterization of a stage-1 training state as stage 2, with a shared modulation that `modulation` fits.

Every tensor that both stages have is carried over. The null class is folded into biases; scales of the modulation are
absorbed by neighbouring weights, and the moments follow (W' = s W: m / s, v / s^2). The output projection of
cross-attention starts at zero, so that stage 2 computes what stage 1 computes, for any text.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from conversion.stage2.modulation import Modulation, absorbed_scales
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.model.dit import state_shapes
from pixart.training.optimizer import MOMENTS

CARRIED, DERIVED, NEW = "carried", "derived", "new"


def to_stage2(source: Checkpoint, modulation: Modulation, ema_modulation: Modulation, text_dim: int) -> Checkpoint:
    """Return the stage-2 training state; its tensors are computed when they are accessed.

    `modulation` is fitted to the weights of `source`, `ema_modulation` to their EMA.
    """
    config = stage2_config(source.config, text_dim)
    return Checkpoint(
        stage=2,
        step=0,
        config=config,
        model=stage2_tensors(source.model, config, modulation),
        ema=stage2_tensors(source.ema, config, ema_modulation),
        optimizer=stage2_moments(source, config, modulation),
        normalization=source.normalization,
        dataset=source.dataset,
        provenance={**source.provenance, "stage1_step": source.step},
    )


def stage2_config(config: Mapping, text_dim: int) -> dict:
    """Return the stage-2 model's configuration."""
    return {**{key: value for key, value in config.items() if key != "num_classes"}, "text_dim": text_dim}


def tensor_provenance(source: Checkpoint, config: Mapping, modulation: Modulation) -> dict[str, str]:
    """Return the provenance of each tensor, its EMA and its moments: carried, derived or new."""
    scaled = {
        name
        for block, scales in enumerate(modulation.scales)
        for name, scale in absorbed_scales(block, scales)
        if (scale != 1).any()
    }
    provenance = {}
    for name in state_shapes(config):
        is_derived = name in scaled or name == "adaLN1.bias" or "_single" in name or name.endswith("adaLNembed")
        provenance[name] = DERIVED if is_derived else CARRIED if name in source.model else NEW
    return provenance


def stage2_tensors(source: State, config: Mapping, modulation: Modulation) -> LazyTensors:
    """Return the stage-2 weights that follow from the stage-1 weights `source` and `modulation`."""
    null_embedding, first = source["cond_proj.weight"][-1].double(), "dit_blocks.0.adaLN1"

    def folded_bias(layer: str) -> Tensor:
        return (source[f"{layer}.bias"].double() + source[f"{layer}.weight"].double() @ null_embedding).float()

    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        makers[name] = functools.partial(
            source.__getitem__ if name in source else functools.partial(initial_tensor, shape), name
        )
    for block, scales in enumerate(modulation.scales):
        makers[f"dit_blocks.{block}.adaLNembed"] = functools.partial(modulation.offsets.__getitem__, block)
        for name, scale in absorbed_scales(block, scales):
            if (scale != 1).any():
                makers[name] = functools.partial(lambda name, scale: source[name] * scale, name, scale)
    makers |= {
        "adaLN1.bias": lambda: folded_bias("adaLN1"),
        "adaLN1_single.weight": lambda: source[f"{first}.weight"],
        "adaLN1_single.bias": lambda: folded_bias(first),
        "adaLN2_single.weight": lambda: modulation.weight,
        "adaLN2_single.bias": lambda: modulation.bias,
    }
    return LazyTensors(makers)


def initial_tensor(shape: tuple[int, ...], name: str) -> Tensor:
    """Initialize a cross-attention tensor as `DiT.initialize` does, from a seed that depends on its name alone."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    tensor = torch.zeros(shape)
    if name.endswith("weight") and "out_proj" not in name:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        nn.init.xavier_uniform_(tensor, generator=torch.Generator().manual_seed(seed))
    return tensor


def stage2_moments(source: Checkpoint, config: Mapping, modulation: Modulation) -> LazyTensors:
    """Return AdamW's state: carried for carried tensors, rescaled for scaled ones, zero with step 0 for the others."""
    absorbed = dict(pair for block, scales in enumerate(modulation.scales) for pair in absorbed_scales(block, scales))
    moments = source.optimizer
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        has_moments = f"{name}.step" in moments and name != "adaLN1.bias"
        if not has_moments and name in source.model and name != "adaLN1.bias":
            continue  # a buffer
        for moment, power in zip(MOMENTS, (1, 2), strict=True):
            key = f"{name}.{moment}"
            if not has_moments:
                makers[key] = functools.partial(torch.zeros, shape)
            elif name in absorbed and (absorbed[name] != 1).any():
                divisor = absorbed[name] ** power
                makers[key] = functools.partial(lambda key, divisor: moments[key] / divisor, key, divisor)
            else:
                makers[key] = functools.partial(moments.__getitem__, key)
        makers[f"{name}.step"] = (
            functools.partial(moments.__getitem__, f"{name}.step") if has_moments else lambda: torch.zeros(())
        )
    return LazyTensors(makers)
