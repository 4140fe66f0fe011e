"""Mapping of the state stored in a file to a training state under the model's parameter names.

The prefixes of torch.compile and DDP are removed from parameter names, moments that are stored by parameter index are
mapped to the parameter's name, and a configuration that is not stored is inferred from the tensors' shapes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.options import BASE_LATENT_SIZE
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.integrity import check_shapes
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.normalization import Normalization
from pixart.config.latent_space import ORIGINAL_PIXEL_RANGE
from pixart.model.dit import DiT, parameter_groups, state_shapes
from pixart.training.optimizer import MOMENTS

PREFIXES = ("_orig_mod.", "module.")
# The original training normalized latents of the SD3 VAE as latent * scaling_factor - shift.
LEGACY_SCALE, LEGACY_SHIFT = 1.5305, 0.177456
INFERRED = "inferred from shapes"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredState:
    """Training state as a file stores it, under the file's parameter names.

    `moments` are keyed NAME.exp_avg or, as in `AdamW.state_dict()`, INDEX.exp_avg.
    """

    source_format: str
    model: Mapping[str, Any]
    ema: Mapping[str, Any] | None = None
    moments: Mapping[str, Any] | None = None
    step: int = -1  # index of the last completed step
    config: dict[str, Any] | None = None  # inferred from shapes if the file has none


def assemble(stored: StoredState, path: Path, base_latent_size: int | None) -> Checkpoint:
    """Build a checkpoint from a stored state. Raises ValueError if its tensors do not make a model of this suite."""
    model = strip_prefixes(stored.model, f"{path}: model")
    config = stored.config or infer_config(model, base_latent_size or BASE_LATENT_SIZE, path)
    check_config(config, path)
    ema = strip_prefixes(stored.ema, f"{path}: model_ema") if stored.ema else model
    for name, state in (("model", model), ("model_ema", ema)):
        check_shapes(state, config, f"{path}: {name}")
    channels = config["in_dim"]
    return Checkpoint(
        stage=1 if config.get("num_classes") else 2,
        step=stored.step + 1,
        config=config,
        model=validated(model, f"{path}: model"),
        ema=validated(ema, f"{path}: model_ema"),
        optimizer=validated(name_moments(stored.moments, config, path), f"{path}: optimizer"),
        normalization=Normalization(
            mean=(LEGACY_SHIFT / LEGACY_SCALE,) * channels,
            std=(1 / LEGACY_SCALE,) * channels,
            pixel_range=ORIGINAL_PIXEL_RANGE,
        ),
        provenance={
            "source": str(path),
            "source_format": stored.source_format,
            "source_config": "stored in the source" if stored.config else INFERRED,
        },
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


def strip_prefixes(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return the tensors of `state` without the name prefixes of torch.compile and DDP.

    Raises ValueError if a value is not a floating-point tensor.
    """
    tensors = {}
    for key, tensor in state.items():
        key = strip_prefix(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: {key!r} is not a tensor but {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {key!r} has dtype {tensor.dtype}; it must be a floating-point tensor")
        tensors[key] = tensor
    return tensors


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


def name_moments(moments: Mapping[str, Any] | None, config: dict[str, Any], path: Path) -> State:
    """Return AdamW's state by parameter name; zeros if the file has no optimizer.

    Parameter indices count through the group with weight decay, then the group without, each in the order of
    `named_modules()`. Raises ValueError if the state does not fit the model's parameters.
    """
    with torch.device("meta"):
        model = DiT(**config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fields = {field: shapes for field in MOMENTS} | {"step": dict.fromkeys(shapes, ())}
    if moments is None:
        return LazyTensors({f"{n}.{f}": zeros(shape[n]) for f, shape in fields.items() for n in shapes})
    decayed, undecayed = parameter_groups(model)
    names_in_order = decayed + undecayed
    stored_key = {name: f"{index}" for index, name in enumerate(names_in_order)}
    stored = {strip_prefix(key): value for key, value in moments.items()}
    if f"{names_in_order[0]}.{MOMENTS[0]}" in stored:
        stored_key = {name: name for name in shapes}
    count = len({key.rpartition(".")[0] for key in stored})
    if count != len(shapes):
        raise ValueError(f"{path}: the optimizer has state for {count} parameters, the model has {len(shapes)}")
    state = {}
    for field, shape_of in fields.items():
        for name in shapes:
            tensor = stored.get(f"{stored_key[name]}.{field}")
            if field == "step" and isinstance(tensor, int | float):
                tensor = torch.tensor(float(tensor))
            if (
                not isinstance(tensor, Tensor)
                or tuple(tensor.shape) != shape_of[name]
                or (field in MOMENTS and not tensor.is_floating_point())
            ):
                actual = (
                    f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
                    if isinstance(tensor, Tensor)
                    else f"type {type(tensor).__name__}"
                )
                raise ValueError(
                    f"{path}: {field} of parameter {stored_key[name]} has {actual}; "
                    f"{name} needs a floating-point tensor of shape {shape_of[name]}"
                )
            state[f"{name}.{field}"] = tensor
    return state


def strip_prefix(key: str) -> str:
    """Return a parameter name without the prefixes of torch.compile and DDP."""
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Return a function that creates a float32 tensor of zeros, for `LazyTensors`."""
    return lambda: torch.zeros(shape)
