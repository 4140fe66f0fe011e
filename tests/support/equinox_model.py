"""The original JAX model as plain functions of its parameters, and files of it as Orbax writes them, without jax."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import torch
from torch import Tensor

from conversion.reading import formats
from pixart.checkpoint.directory import Checkpoint

SIZES: dict[str, Any] = {"channels": 16, "dim": 32, "cond_dim": 16, "heads": 2, "blocks": 2, "patch": 2, "classes": 5}
BASE_LATENT_SIZE = 8
BUFFERS = ("time_proj.emb", "pos_embed.emb")
MU, NU, COUNT = "1.1.0.mu", "1.1.0.nu", "1.1.0.count"
Arrays = dict[str, np.ndarray]


def random_parameters(*, qk_norm_bias: bool = True, seed: int = 0, sizes: Mapping[str, Any] = SIZES) -> Arrays:
    """Return random parameters by name; modulations vary smoothly with t, as after training."""
    generator = np.random.default_rng(seed)
    dim, cond_dim = sizes["dim"], sizes["cond_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "patchify.weight": (dim, sizes["channels"], sizes["patch"], sizes["patch"]),
        "patchify.bias": (dim, 1, 1),
        "cond_proj.weight": (sizes["classes"], cond_dim),
        "linear_out.weight": (sizes["patch"] ** 2 * sizes["channels"], dim),
        "linear_out.bias": (sizes["patch"] ** 2 * sizes["channels"],),
        **modulation_shapes("", cond_dim, dim, 2),
    }
    for block in range(sizes["blocks"]):
        prefix = f"dit_blocks.{block}."
        shapes |= modulation_shapes(prefix, cond_dim, dim, 6)
        for layer, rows, columns in [
            *((f"attention.attention.{name}_proj", dim, dim) for name in ("q", "k", "v", "out")),
            ("mlp.linear1", 4 * dim, dim),
            ("mlp.linear2", dim, 4 * dim),
        ]:
            shapes |= {f"{prefix}{layer}.weight": (rows, columns), f"{prefix}{layer}.bias": (rows,)}
        for norm in ("q_norm", "k_norm"):
            for kind in ("weight", "bias")[: 1 + qk_norm_bias]:
                shapes[f"{prefix}attention.attention.{norm}.{kind}"] = (dim // sizes["heads"],)
    parameters = {}
    for name, shape in shapes.items():
        std = 0.1 if "adaLN" in name or "bias" in name else 0.2
        parameters[name] = generator.normal(scale=std, size=shape).astype(np.float32)
        if name.endswith("adaLN1.weight"):  # high frequencies of the time have little weight
            parameters[name] *= np.tile(np.linspace(0, 1, cond_dim // 2) ** 2, 2).astype(np.float32)
        if name.endswith("norm.weight"):
            parameters[name] += 0.5
    for name, length in (("time_proj.emb", cond_dim // 2), ("pos_embed.emb", dim // 4)):
        parameters[name] = np.exp(-math.log(10_000) * np.arange(length) / (length - 1)).astype(np.float32)
    return parameters


def modulation_shapes(prefix: str, cond_dim: int, dim: int, chunks: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}adaLN1.weight": (dim, cond_dim),
        f"{prefix}adaLN1.bias": (dim,),
        f"{prefix}adaLN2.weight": (chunks * dim, dim),
        f"{prefix}adaLN2.bias": (chunks * dim,),
    }


def training_state(parameters: Arrays, *, count: int = 3, seed: int = 1) -> Arrays:
    """Return the arrays of a state: the model, random moments of AdamW, and both counts of steps."""
    generator = np.random.default_rng(seed)
    arrays = {f"0.{name}": value for name, value in parameters.items()}
    for name, value in parameters.items():
        if name not in BUFFERS:
            moment = generator.normal(scale=1e-3, size=value.shape).astype(np.float32)
            arrays |= {f"{MU}.{name}": moment, f"{NU}.{name}": 1.5 * moment**2}
    return arrays | {COUNT: np.int32(count), "1.1.2.count": np.int32(count)}


def velocity(
    parameters: Mapping[str, Tensor],
    x: Tensor,
    t: Tensor,
    label: Tensor,
    *,
    heads: int = SIZES["heads"],
    base_latent_size: int = BASE_LATENT_SIZE,
) -> Tensor:
    """Return the velocity (B, C, H, W) of the JAX model, with sines and cosines concatenated and attention scale 1."""
    p = parameters
    _, channels, patch, _ = p["patchify.weight"].shape
    height, width = x.shape[-2] // patch, x.shape[-1] // patch
    tokens = torch.nn.functional.conv2d(x, p["patchify.weight"], p["patchify.bias"].flatten(), stride=patch)
    tokens = tokens.flatten(2).transpose(1, 2)
    base = base_latent_size // patch
    y, z = torch.meshgrid(torch.arange(height) * (base / height), torch.arange(width) * (base / width), indexing="ij")
    tokens = tokens + torch.cat([waves(axis.flatten(), p["pos_embed.emb"]) for axis in (y, z)], dim=1)
    condition = waves(1000 * t, p["time_proj.emb"]) + p["cond_proj.weight"][label]
    blocks = {name.split(".")[1] for name in p if name.startswith("dit_blocks.")}
    for block in sorted(blocks, key=int):
        prefix = f"dit_blocks.{block}."
        gamma1, beta1, gamma2, beta2, alpha1, alpha2 = modulation(p, prefix, condition, 6)
        inputs = normalize(tokens) * (1 + gamma1) + beta1
        tokens = tokens + alpha1 * attention(p, f"{prefix}attention.attention.", inputs, heads)
        hidden = linear(p, f"{prefix}mlp.linear1", normalize(tokens) * (1 + gamma2) + beta2)
        tokens = tokens + alpha2 * linear(p, f"{prefix}mlp.linear2", torch.nn.functional.silu(hidden))
    gamma, beta = modulation(p, "", condition, 2)
    output = linear(p, "linear_out", normalize(tokens) * (1 + gamma) + beta)
    output = output.view(len(x), height, width, patch, patch, channels)
    return output.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def waves(values: Tensor, frequencies: Tensor) -> Tensor:
    angles = values[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def linear(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.weight"].t() + p[f"{name}.bias"]


def modulation(p: Mapping[str, Tensor], prefix: str, condition: Tensor, chunks: int) -> tuple[Tensor, ...]:
    hidden = torch.nn.functional.silu(linear(p, f"{prefix}adaLN1", condition))
    return linear(p, f"{prefix}adaLN2", hidden)[:, None].chunk(chunks, dim=-1)


def normalize(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def attention(p: Mapping[str, Tensor], prefix: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = (linear(p, f"{prefix}{name}_proj", x).unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
    q, k = (rms_norm(p, f"{prefix}{name}", tensor) for name, tensor in (("q_norm", q), ("k_norm", k)))
    attended = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return linear(p, f"{prefix}out_proj", attended.transpose(1, 2).flatten(2))


def rms_norm(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    normalized = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"]
    return normalized + p[f"{name}.bias"] if f"{name}.bias" in p else normalized


def write_item(folder: Path, arrays: Mapping[str, Any], *, use_ocdbt: bool = True, use_zarr3: bool = False) -> None:
    """Write an item as Orbax does, with an entry for an array that is None, as of a norm without weights."""
    folder.mkdir(parents=True)
    tree, stores, context = {}, {}, tensorstore.Context()
    for name, array in {"layer_norm.weight": None, **arrays}.items():
        keys = [{"key": key, "key_type": 2} for key in name.split(".")]
        value = {"value_type": "None" if array is None else "jax.Array", "skip_deserialize": array is None}
        tree[str(tuple(name.split(".")))] = {"key_metadata": keys, "value_metadata": value}
        if array is not None:
            base = {"driver": "file", "path": f"{folder}/"}
            database = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            spec = {
                "driver": "zarr3" if use_zarr3 else "zarr",
                "kvstore": database if use_ocdbt else {"driver": "file", "path": f"{folder}/{name}/"},
                "store_data_equal_to_fill_value": True,
            }
            settings = {"dtype": tensorstore.dtype(array.dtype), "shape": np.shape(array)}
            stores[name] = tensorstore.open(spec, create=True, context=context, **settings)
    for write in [store.result().write(arrays[name]) for name, store in stores.items()]:
        write.result()
    metadata = {"tree_metadata": tree, "use_ocdbt": use_ocdbt, "use_zarr3": use_zarr3}
    metadata["store_array_data_equal_to_fill_value"] = True
    (folder / "_METADATA").write_text(json.dumps(metadata))


def write_step(folder: Path, state: Arrays, ema: Arrays | None, **layout: bool) -> Path:
    """Write a step with the items `state` and, unless it is None, `model_ema`."""
    items = {"state": state} | ({} if ema is None else {"model_ema": ema})
    for name, arrays in items.items():
        write_item(folder / name, arrays, **layout)
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": dict.fromkeys(items, "Standard")}))
    return folder


def read(path: Path) -> Checkpoint:
    """Read a checkpoint of these sizes."""
    return formats.read(path, base_latent_size=BASE_LATENT_SIZE)


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}


def check_output(actual: Tensor, expected: Tensor) -> None:
    """Assert the largest and the RMS difference relative to the RMS of `expected`."""
    rms = expected.square().mean().sqrt()
    assert float((actual - expected).abs().max() / rms) < 1e-4
    assert float((actual - expected).square().mean().sqrt() / rms) < 1e-5
