"""Mapping of the state stored in a file to a training state under the model's parameter names.

The names of wrappers, such as those of torch.compile, DDP and FSDP, are removed from parameter names,
TransformerEngine's extra states are skipped, moments that are stored by parameter index are mapped to the parameter's
name, and a configuration that is not stored is inferred: the sizes from the tensors' shapes, and the eps of the norms
of queries and keys from what wrote the file. The eps is TransformerEngine's if a state dictionary has an
extra state, or if the optimizer's groups are those of its RMSNorm, and otherwise PyTorch's default, which BF16 files
were trained with. Weights of TransformerEngine that were saved alone and without extra states cannot be distinguished
from BF16 files; their outputs change by about 4e-6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.options import BASE_LATENT_SIZE
from conversion.reading import transformer_engine
from conversion.reading.moments import name_moments
from conversion.reading.names import bare_names
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.inert import MOST_LETTERS, describe
from pixart.checkpoint.integrity import check_shapes
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.normalization import Normalization
from pixart.config.latent_space import ORIGINAL_PIXEL_RANGE
from pixart.model.dit import state_shapes
from pixart.terminal import printable
from pixart.training.optimizer import MOMENTS

# The original training normalized latents of the SD3 VAE as latent * scaling_factor - shift.
LEGACY_SCALE, LEGACY_SHIFT = 1.5305, 0.177456
# The original training replaced this fraction of the labels by the null class, and no caption by the empty text.
LEGACY_COND_DROPOUT_PROB = {1: 0.1, 2: 0.0}
INFERRED = "inferred from shapes"
BUFFERS = ("time_proj.freqs", "pos_embed.div_term")  # tensors of the model that are not parameters
MOST_NAMES = 10  # of unused entries that are listed


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredState:
    """Training state as a file stores it, under the file's parameter names.

    `moments` are keyed NAME.exp_avg or, as in `AdamW.state_dict()`, INDEX.exp_avg, by the indices in `param_groups`.
    """

    source_format: str
    model: Mapping[str, Any]
    ema: Mapping[str, Any] | Sequence[Any] | None = None  # a sequence is in the order of the model's parameters
    moments: Mapping[str, Any] | None = None
    param_groups: Sequence[Any] | None = None
    step: int = -1  # index of the last completed step
    config: dict[str, Any] | None = None  # inferred from shapes if the file has none
    is_original: bool = False  # whether the original training code wrote the file
    unused: Sequence[str] = ()  # entries of the file that are not part of this state


def assemble(stored: StoredState, path: Path, base_latent_size: int | None) -> Checkpoint:
    """Build a checkpoint from a stored state. Raises ValueError if its tensors do not make a model of this suite."""
    states = {"model": stored.model} | ({"model_ema": stored.ema} if isinstance(stored.ema, Mapping) else {})
    extra_states = {name: sum(map(transformer_engine.is_extra_state, state)) for name, state in states.items()}
    has_extra_states = any(extra_states.values())
    model = strip_wrappers(stored.model, f"{path}: model")
    if has_extra_states:
        transformer_engine.check_layout(model, path)
    config = stored.config or infer_config(model, base_latent_size or BASE_LATENT_SIZE, path)
    check_config(config, path)
    ema = average_of(stored.ema, model, config, f"{path}: model_ema") if stored.ema else model
    for name, state in (("model", model), ("model_ema", ema)):
        check_shapes(state, config, f"{path}: {name}")
    moments, decay_qk_norm = name_moments(stored.moments, stored.param_groups, config, path)
    if not stored.config and (has_extra_states or decay_qk_norm):
        config["qk_norm_eps"] = transformer_engine.QK_NORM_EPS
    stage = 1 if config.get("num_classes") else 2
    provenance: dict[str, Any] = {
        "source": str(path),
        "source_format": stored.source_format,
        "source_config": "stored in the source" if stored.config else INFERRED,
    }
    if stored.is_original or has_extra_states:
        provenance["cond_dropout_prob"] = LEGACY_COND_DROPOUT_PROB[stage]
    if has_extra_states:
        provenance["skipped_extra_states"] = extra_states
    if stored.unused:
        provenance["unused_entries"] = {
            "count": len(stored.unused),
            "names": [printable(name[:MOST_LETTERS]) for name in stored.unused[:MOST_NAMES]],
        }
    if decay_qk_norm:
        provenance["decay_qk_norm"] = True
    return Checkpoint(
        stage=stage,
        step=stored.step + 1,
        config=config,
        model=validated(model, f"{path}: model"),
        ema=validated(ema, f"{path}: model_ema"),
        optimizer=validated(moments, f"{path}: optimizer"),
        normalization=original_normalization(config["in_dim"]),
        provenance=provenance,
    )


def original_normalization(channels: int) -> Normalization:
    """Return the normalization of the original training for latents of that many channels."""
    return Normalization(
        mean=(LEGACY_SHIFT / LEGACY_SCALE,) * channels,
        std=(1 / LEGACY_SCALE,) * channels,
        pixel_range=ORIGINAL_PIXEL_RANGE,
    )


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if `config` is not a configuration of `DiT`."""
    try:
        state_shapes(config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its configuration is not that of a PixArt model of this suite: {error}") from None
    side, patch = config["base_image_size"], config["patch_size"]
    if side < patch or side % patch:
        raise ValueError(f"--base-latent-size {side}: must be a multiple of the patch size, {patch}")


def strip_wrappers(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors of `state` without the names of wrappers within theirs, and without extra states.

    Raises ValueError if a value is not a floating-point tensor, or if two names become one.
    """
    stored = transformer_engine.without_extra_states(state)
    tensors = {}
    for key, stored_key in bare_names(stored, name).items():
        tensor = stored[stored_key]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: {key!r} is not a tensor but {describe(tensor)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {key!r} has dtype {tensor.dtype}; it must be a floating-point tensor")
        if tensor.dtype.itemsize == 1:
            raise ValueError(
                f"{name}: {key!r} has dtype {tensor.dtype}, whose scale is not known; give a folder of FP8 "
                "weights with its inference.json"
            )
        tensors[key] = tensor
    return tensors


def average_of(
    stored: Mapping[str, Any] | Sequence[Any], model: Mapping[str, Tensor], config: Mapping[str, Any], name: str
) -> dict[str, Tensor]:
    """Return the EMA weights by the names of the model's tensors.

    An EMA without names is in the order of the model's parameters, names may lack their dots, and buffers, which are
    not averaged, are the model's. Raises ValueError if the number of tensors is not that of the parameters.
    """
    buffers = {key: model[key] for key in BUFFERS if key in model}
    if not isinstance(stored, Mapping):
        ordered = list(state_shapes(config))  # and not in the order of the file, which safetensors sorts by name
        names = ordered if len(stored) == len(ordered) else [key for key in ordered if key not in BUFFERS]
        if len(stored) != len(names):
            raise ValueError(f"{name}: has {len(stored)} tensors, the model has {len(names)} parameters")
        stored = dict(zip(names, stored, strict=True))
    tensors = strip_wrappers(stored, name)
    dotted = {key.replace(".", ""): key for key in model}
    return buffers | {dotted.get(key, key): tensor for key, tensor in tensors.items()}


def validated(state: State, name: str) -> LazyTensors:
    """Return the tensors in float32, each validated at its first access.

    The access raises ValueError if a value is infinite or NaN, or if a second moment is negative.
    """
    valid_keys: set[str] = set()

    def loader(key: str) -> Callable[[], Tensor]:
        def load() -> Tensor:
            tensor = state[key].float()
            if key in valid_keys:
                return tensor
            low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.new_zeros(()),) * 2
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(f"{name}: {key} has a value that is infinite or NaN")
            if key.endswith(MOMENTS[1]) and low < 0:
                raise ValueError(f"{name}: {key} has a negative value; a second moment must not be negative")
            valid_keys.add(key)
            return tensor

        return load

    return LazyTensors({key: loader(key) for key in state})


def infer_config(state: Mapping[str, Tensor], base_latent_size: int, path: Path) -> dict[str, Any]:
    """Infer the model's configuration from the shapes, which determine all of it but `base_latent_size`.

    Raises ValueError if the tensors are not those of a stage-1 or stage-2 model.
    """
    try:
        dim, in_dim, patch_size, _ = state["patchify.weight"].shape
        first = "dit_blocks.0."
        config = {
            "in_dim": in_dim,
            "dim": dim,
            "cond_dim": state["adaLN1.weight"].shape[1],
            "num_heads": dim // state[f"{first}attention.attention.q_norm.weight"].shape[0],
            "mlp_ratio": state[f"{first}mlp.linear1.weight"].shape[0] // dim,
            "num_blocks": len({key.split(".")[1] for key in state if key.startswith("dit_blocks.")}),
            "patch_size": patch_size,
            "base_image_size": base_latent_size,
        }
        if "cond_proj.weight" in state:
            config["num_classes"] = state["cond_proj.weight"].shape[0]
        else:
            config["text_dim"] = state[f"{first}cross_attention.k_proj.weight"].shape[1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its tensors are not those of a stage-1 or stage-2 model ({error})") from error
    if not dim or dim % (config["num_heads"] or dim + 1) or not config["mlp_ratio"]:
        raise ValueError(f"{path}: the shapes of its tensors make no model ({dim=}, num_heads={config['num_heads']})")
    return config
