"""From what a file holds, under its own names, to a training state under the model's.

Names lose the prefixes of torch.compile and DDP, moments that are counted get the name of their parameter, and shapes
say what the configuration is where nothing else does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.options import BASE_LATENT_SIZE
from pixart.checkpoint.directory import Checkpoint, Lazy, State, check_shapes
from pixart.checkpoint.normalization import Normalization
from pixart.model.dit import DiT, parameter_groups, state_shapes
from pixart.training.optimizer import MOMENTS

PREFIXES = ("_orig_mod.", "module.")
# The original training's normalization: latent * scaling_factor - shift, of the SD3 VAE's latents.
LEGACY_SCALE, LEGACY_SHIFT = 1.5305, 0.177456


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a file holds, under its own names; moments by `NAME.exp_avg`, or by a parameter's number in its place."""

    kind: str
    model: Mapping[str, Any]
    ema: Mapping[str, Any] | None = None
    moments: Mapping[str, Any] | None = None
    step: int = -1  # index of the last step done
    config: dict[str, Any] | None = None  # inferred where the file has none


def assemble(content: Content, path: Path, base_image_size: int | None) -> Checkpoint:
    model = clean(content.model, f"{path}: model")
    config = content.config or infer_config(model, base_image_size or BASE_LATENT_SIZE, path)
    check_config(config, path)
    ema = clean(content.ema, f"{path}: model_ema") if content.ema else model
    for name, state in (("model", model), ("model_ema", ema)):
        check_shapes(state, config, f"{path}: {name}")
    channels = config["in_dim"]
    return Checkpoint(
        stage=1 if config.get("num_classes") else 2,
        step=content.step + 1,
        config=config,
        model=checked(model, f"{path}: model"),
        ema=checked(ema, f"{path}: model_ema"),
        optimizer=checked(name_moments(content.moments, config, path), f"{path}: optimizer"),
        normalization=Normalization(mean=(LEGACY_SHIFT / LEGACY_SCALE,) * channels, std=(1 / LEGACY_SCALE,) * channels),
        provenance={
            "source": str(path),
            "source_format": content.kind,
            "source_config": "its own" if content.config else "inferred from shapes",
        },
    )


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError for a configuration that is not of our model."""
    try:
        state_shapes(config)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its configuration is not that of a PixArt of this suite: {error}") from None
    side, patch = config["base_image_size"], config["patch_size"]
    if side < patch or side % patch:
        raise ValueError(f"--base-latent-size {side}: must be a multiple of the patch, {patch}")


def clean(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Without the key prefixes of torch.compile and DDP."""
    cleaned = {}
    for key, tensor in state.items():
        key = strip(key)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name}: {key!r} is no tensor but {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: {key!r} is of {tensor.dtype}, not a floating-point tensor")
        cleaned[key] = tensor
    return cleaned


def checked(state: State, name: str) -> Lazy:
    """The tensors in float32; to ask for one that has a value it cannot have raises ValueError, the first time."""
    seen: set[str] = set()

    def maker(key: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            tensor = state[key].float()
            if key in seen:
                return tensor
            low, high = torch.aminmax(tensor) if tensor.numel() else (tensor.new_zeros(()),) * 2
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ValueError(f"{name}: {key} has a value that is infinite or not a number")
            if key.endswith(MOMENTS[1]) and low < 0:
                raise ValueError(f"{name}: {key}, a mean of squares, has a negative value")
            seen.add(key)
            return tensor

        return make

    return Lazy({key: maker(key) for key in state})


def infer_config(state: Mapping[str, Tensor], base_image_size: int, path: Path) -> dict[str, Any]:
    """The configuration that the shapes imply; `base_image_size` is not among what they say."""
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
            "base_image_size": base_image_size,
        }
        if "cond_proj.weight" in state:
            config["num_classes"] = state["cond_proj.weight"].shape[0]
        else:
            config["text_dim"] = state[f"{first}cross_attention.k_proj.weight"].shape[1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its tensors are not those of a stage-1 or stage-2 model ({error})") from error
    if not dim or dim % (config["num_heads"] or dim + 1) or not config["mlp_ratio"]:
        raise ValueError(f"{path}: its tensors have shapes that make no model ({dim=}, heads {config['num_heads']})")
    return config


def name_moments(moments: Mapping[str, Any] | None, config: dict[str, Any], path: Path) -> State:
    """AdamW's moments by parameter name; zeros where the file has no optimizer.

    A file that counts parameters goes through the decayed group, then the other, each in the order of its modules.
    """
    with torch.device("meta"):
        model = DiT(**config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fields = {field: shapes for field in MOMENTS} | {"step": dict.fromkeys(shapes, ())}
    if moments is None:
        return Lazy({f"{n}.{f}": zeros(shape[n]) for f, shape in fields.items() for n in shapes})
    decayed, undecayed = parameter_groups(model)
    own_names = dict(enumerate(decayed + undecayed))
    own_key = {name: f"{number}" for number, name in own_names.items()}
    cleaned = {strip(key): value for key, value in moments.items()}
    if f"{own_names[0]}.{MOMENTS[0]}" in cleaned:
        own_key = {name: name for name in shapes}
    count = len({key.rpartition(".")[0] for key in cleaned})
    if count != len(shapes):
        raise ValueError(f"{path}: the optimizer has state for {count} parameters, the model has {len(shapes)}")
    state = {}
    for field, shape_of in fields.items():
        for name in shapes:
            found = cleaned.get(f"{own_key[name]}.{field}")
            if field == "step" and isinstance(found, int | float):
                found = torch.tensor(float(found))
            if (
                not isinstance(found, Tensor)
                or tuple(found.shape) != shape_of[name]
                or (field in MOMENTS and not found.is_floating_point())
            ):
                what = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"{path}: {field} of parameter {own_key[name]} is {what}, {name} needs {shape_of[name]} of floats"
                )
            state[f"{name}.{field}"] = found
    return state


def strip(key: str) -> str:
    while key.startswith(PREFIXES):
        key = key.split(".", 1)[1]
    return key


def zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)
