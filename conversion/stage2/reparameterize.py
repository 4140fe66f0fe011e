"""Stage 1 to stage 2: a whole training state, with the shared modulation that `modulation` finds.

Everything that both stages have is copied. The class is frozen to "no class" and baked into biases; scales of the
modulation go into the weights beside it, and their moments follow (W' = s W: m / s, v / s^2). Cross-attention begins
at zero, so that stage 2 says what stage 1 says whatever the text is.
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


def to_stage2(source: Checkpoint, modulation: Modulation, average: Modulation, text_dim: int) -> Checkpoint:
    """The training state with the modulations of its weights and of their average, tensors made when asked for."""
    config = stage2_config(source.config, text_dim)
    return Checkpoint(
        stage=2,
        step=0,
        config=config,
        model=stage2_tensors(source.model, config, modulation),
        ema=stage2_tensors(source.ema, config, average),
        optimizer=stage2_moments(source, config, modulation),
        normalization=source.normalization,
        dataset=source.dataset,
        provenance={**source.provenance, "stage1_step": source.step},
    )


def stage2_config(config: Mapping, text_dim: int) -> dict:
    return {**{key: value for key, value in config.items() if key != "num_classes"}, "text_dim": text_dim}


def fates(source: Checkpoint, config: Mapping, modulation: Modulation) -> dict[str, str]:
    """What becomes of each tensor, and so of its average and moments: carried, derived or new."""
    changed = {
        name
        for block, scales in enumerate(modulation.scales)
        for name, scale in absorbed_scales(block, scales)
        if (scale != 1).any()
    }
    found = {}
    for name in state_shapes(config):
        is_derived = name in changed or name == "adaLN1.bias" or "_single" in name or name.endswith("adaLNembed")
        found[name] = "derived" if is_derived else "carried" if name in source.model else "new"
    return found


def stage2_tensors(source: State, config: Mapping, modulation: Modulation) -> LazyTensors:
    none, first = source["cond_proj.weight"][-1].double(), "dit_blocks.0.adaLN1"

    def baked(layer: str) -> Tensor:
        return (source[f"{layer}.bias"].double() + source[f"{layer}.weight"].double() @ none).float()

    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        makers[name] = functools.partial(
            source.__getitem__ if name in source else functools.partial(fresh, shape), name
        )
    for block, scales in enumerate(modulation.scales):
        makers[f"dit_blocks.{block}.adaLNembed"] = functools.partial(modulation.offsets.__getitem__, block)
        for name, scale in absorbed_scales(block, scales):
            if (scale != 1).any():
                makers[name] = functools.partial(lambda name, scale: source[name] * scale, name, scale)
    makers |= {
        "adaLN1.bias": lambda: baked("adaLN1"),
        "adaLN1_single.weight": lambda: source[f"{first}.weight"],
        "adaLN1_single.bias": lambda: baked(first),
        "adaLN2_single.weight": lambda: modulation.weight,
        "adaLN2_single.bias": lambda: modulation.bias,
    }
    return LazyTensors(makers)


def fresh(shape: tuple[int, ...], name: str) -> Tensor:
    """A tensor of cross-attention that stage 1 has nothing for, as `DiT.initialize` begins it; the same every time."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    tensor = torch.zeros(shape)
    if name.endswith("weight") and "out_proj" not in name:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        nn.init.xavier_uniform_(tensor, generator=torch.Generator().manual_seed(seed))
    return tensor


def stage2_moments(source: Checkpoint, config: Mapping, modulation: Modulation) -> LazyTensors:
    """Carried with what is carried, scaled with what is scaled; zero, with a step count of their own, for the rest."""
    absorbed = dict(pair for block, scales in enumerate(modulation.scales) for pair in absorbed_scales(block, scales))
    old = source.optimizer
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        known = f"{name}.step" in old and name != "adaLN1.bias"
        if not known and name in source.model and name != "adaLN1.bias":
            continue  # a buffer
        for moment, power in zip(MOMENTS, (1, 2), strict=True):
            key = f"{name}.{moment}"
            if not known:
                makers[key] = functools.partial(torch.zeros, shape)
            elif name in absorbed and (absorbed[name] != 1).any():
                divisor = absorbed[name] ** power
                makers[key] = functools.partial(lambda key, divisor: old[key] / divisor, key, divisor)
            else:
                makers[key] = functools.partial(old.__getitem__, key)
        makers[f"{name}.step"] = (
            functools.partial(old.__getitem__, f"{name}.step") if known else lambda: torch.zeros(())
        )
    return LazyTensors(makers)
