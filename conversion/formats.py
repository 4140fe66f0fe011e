"""Reading training checkpoints, whatever wrote them, recognized by content.

Known are our own checkpoint directories and the `.pt` file of the original stage-1 and stage-2 training:
`{"model", "model_ema", "optimizer", "step"}`, keys with or without `_orig_mod.` and `module.`, float32 or bfloat16.
"""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart import checkpoint as checkpoints
from pixart.checkpoint import Checkpoint, Normalization, State, check_shapes
from pixart.model.dit import DiT, parameter_groups
from pixart.training.optimizer import MOMENTS

PREFIXES = ("_orig_mod.", "module.")
# The original training's normalization: latent * scaling_factor - shift, of the SD3 VAE's latents.
LEGACY_SCALE, LEGACY_SHIFT = 1.5305, 0.177456
BASE_IMAGE_SIZE = 32  # of the original training; a legacy file does not say


def read(path: str | Path, *, base_image_size: int | None = None) -> Checkpoint:
    """Reads a checkpoint by its content.

    Raises ValueError in one line for a path that does not exist, is no checkpoint, is truncated, or has tensors of
    shapes that make no model.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir():
        if base_image_size is not None:
            raise ValueError(f"--base-image-size: {path} says its own, the option is for files that do not")
        return checkpoints.load(checkpoints.find(path))
    return read_legacy(path, base_image_size or BASE_IMAGE_SIZE)


def read_legacy(path: Path, base_image_size: int) -> Checkpoint:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: it is no PyTorch checkpoint, or a truncated one") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is no training checkpoint: it has no 'model' with tensors by name")
    model = clean(content["model"], path)
    config = infer_config(model, base_image_size, path)
    ema = clean(content["model_ema"], path) if content.get("model_ema") else model
    for name, state in (("model", model), ("model_ema", ema)):
        check_shapes(state, config, f"{path}: {name}")
    channels = config["in_dim"]
    return Checkpoint(
        stage=1 if "num_classes" in config else 2,
        step=int(content.get("step", -1)) + 1,  # the file has the index of the last step done
        config=config,
        model=model,
        ema=ema,
        optimizer=name_moments(content.get("optimizer"), config, path),
        normalization=Normalization(mean=(LEGACY_SHIFT / LEGACY_SCALE,) * channels, std=(1 / LEGACY_SCALE,) * channels),
        provenance={"source": str(path), "source_format": "legacy"},
    )


def clean(state: dict[str, Any], path: Path) -> State:
    """Key prefixes of torch.compile and DDP removed, tensors in float32."""
    cleaned = {}
    for key, tensor in state.items():
        while key.startswith(PREFIXES):
            key = key.split(".", 1)[1]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is no tensor but {type(tensor).__name__}")
        cleaned[key] = tensor.float()
    return cleaned


def infer_config(state: State, base_image_size: int, path: Path) -> dict[str, Any]:
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
            "num_blocks": 1 + max(int(key.split(".")[1]) for key in state if key.startswith("dit_blocks.")),
            "patch_size": patch_size,
            "base_image_size": base_image_size,
        }
        if "cond_proj.weight" in state:
            config["num_classes"] = state["cond_proj.weight"].shape[0]
        else:
            config["text_dim"] = state[f"{first}cross_attention.k_proj.weight"].shape[1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: its tensors are not those of a stage-1 or stage-2 model ({error})") from error
    if dim % config["num_heads"] or not config["mlp_ratio"]:
        raise ValueError(f"{path}: its tensors have shapes that make no model ({dim=}, heads {config['num_heads']})")
    return config


def name_moments(optimizer: dict[str, Any] | None, config: dict[str, Any], path: Path) -> State:
    """AdamW's moments by parameter name; zeros where the file has no optimizer.

    The file counts parameters through the decayed group, then the other, each in the order of its modules.
    """
    with torch.device("meta"):
        model = DiT(**config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    decayed, undecayed = parameter_groups(model)
    saved = optimizer["state"] if optimizer else {}
    if saved and len(saved) != len(shapes):
        raise ValueError(f"{path}: the optimizer has state for {len(saved)} parameters, the model has {len(shapes)}")
    state = {}
    for index, name in enumerate(decayed + undecayed):
        for moment in MOMENTS:
            tensor = saved[index][moment].float() if saved else torch.zeros(shapes[name])
            if tensor.shape != shapes[name]:
                raise ValueError(
                    f"{path}: {moment} number {index} has shape {tuple(tensor.shape)}, {name} has {tuple(shapes[name])}"
                )
            state[f"{name}.{moment}"] = tensor
        state[f"{name}.step"] = torch.as_tensor(saved[index]["step"] if saved else 0.0).float()
    return state


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of a checkpoint directory's files in order of their names."""
    path = Path(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
