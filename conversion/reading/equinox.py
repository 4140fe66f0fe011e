"""Parameters of the original JAX model, an Equinox module, under the names and in the layout of this suite's model.

Both models have the same architecture. They differ in the order of channels, because the JAX model concatenates sines
and cosines where this one interleaves them, in the unit of the time's frequencies, and in the scale of attention, which
is 1 there and 1 / sqrt(head_dim) here.

    P  channels of the image tokens: P[2k] = k, P[2k+1] = Q+k, P[D/2+2k] = 2Q+k, P[D/2+2k+1] = 3Q+k, with Q = D / 4
    C  channels of the condition: C[2k] = k, C[2k+1] = H+k, with H = cond_dim / 2

Channel i of this suite is channel P[i], or C[i], of the JAX model. The bias of the keys' norm is dropped: it adds the
same value to all logits of a query, which softmax ignores. That of the queries' norm is kept wherever the file has one,
also where it is zero, because training continues to train it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

EPS = 1e-5  # of Equinox's RMSNorm
MAX_TIME = 1000  # the JAX model multiplies t by this, this suite's model has it in its frequencies
RENAMED = {"time_proj.emb": "time_proj.freqs", "pos_embed.emb": "pos_embed.div_term"}
BUFFERS = frozenset(RENAMED)  # arrays that are not trained and have no moments
Q_NORM, K_NORM = "attention.attention.q_norm", "attention.attention.k_norm"
DROPPED = f"{K_NORM}.bias"
DROPPED_REASON = "k_norm.bias, which adds the same value to all logits of a query, so that softmax ignores it"
# Parameters, without the prefix of their block, by the channels that they are ordered by.
TOKEN_COLUMNS = {f"attention.attention.{name}_proj.weight" for name in "qkv"} | {"mlp.linear1.weight"}
TOKEN_COLUMNS |= {"linear_out.weight"}
TOKEN_ROWS = {
    f"{layer}.{kind}"
    for layer in ("patchify", "attention.attention.out_proj", "mlp.linear2")
    for kind in ("weight", "bias")
}
CHUNKS_OF_TOKEN_ROWS = {"adaLN2.weight", "adaLN2.bias"}
CONDITION_COLUMNS = {"cond_proj.weight", "adaLN1.weight"}


def kind_of(name: str) -> str:
    """Return a parameter's name without the prefix of its block."""
    return re.sub(r"^dit_blocks\.\d+\.", "", name)


def is_dropped(name: str) -> bool:
    """Return whether this suite's model has no parameter for the JAX model's parameter `name`."""
    return kind_of(name) == DROPPED


def suite_name(name: str) -> str:
    """Return the name in this suite's model of the JAX model's parameter `name`."""
    return RENAMED.get(name, name)


def expected_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the JAX model's parameters from those of this suite's model."""
    names = {suite: name for name, suite in RENAMED.items()}
    expected = {names.get(name, name): shape for name, shape in shapes.items()}
    expected["patchify.bias"] = (*shapes["patchify.bias"], 1, 1)
    return expected | {
        name.replace(Q_NORM, K_NORM): shape for name, shape in shapes.items() if name.endswith(f"{Q_NORM}.bias")
    }


def weight(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return a weight of the JAX model in this suite's layout, for a model of configuration `config`."""
    factor = MAX_TIME if name == "time_proj.emb" else weight_factor(name, config)
    return reorder(name, tensor, config) * factor


def moment(name: str, tensor: Tensor, config: Mapping[str, Any], order: int) -> Tensor:
    """Return AdamW's first (`order` 1) or second (2) moment of a parameter in this suite's layout.

    The loss of the JAX training is half of the mean squared error, and a parameter that is s times as large as there
    has a gradient that is s times as small.
    """
    return reorder(name, tensor, config) * (2 / weight_factor(name, config)) ** order


def weight_factor(name: str, config: Mapping[str, Any]) -> float:
    """Return the quotient of a trained parameter of this suite and that of the JAX model."""
    return math.sqrt(config["dim"] // config["num_heads"]) if kind_of(name).startswith(f"{Q_NORM}.") else 1.0


def reorder(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return a parameter, or a moment of it, with its channels in the order of this suite."""
    kind = kind_of(name)
    if kind == "patchify.bias":
        tensor = tensor.flatten()
    if kind in TOKEN_COLUMNS:
        return tensor[:, token_channels(config["dim"])]
    if kind in TOKEN_ROWS:
        return tensor[token_channels(config["dim"])]
    if kind in CHUNKS_OF_TOKEN_ROWS:
        chunks = tensor.unflatten(0, (-1, config["dim"]))
        return chunks[:, token_channels(config["dim"])].flatten(0, 1)
    if kind in CONDITION_COLUMNS:
        return tensor[:, interleaved(config["cond_dim"])]
    return tensor


def interleaved(size: int) -> Tensor:
    """Return 0, size/2, 1, size/2 + 1, ...: interleaved from concatenated sines and cosines -> (size,)."""
    return torch.arange(size).view(2, -1).t().flatten()


def token_channels(dim: int) -> Tensor:
    """Return P, the channels of the rows' embedding and then those of the columns' -> (dim,)."""
    half = interleaved(dim // 2)
    return torch.cat([half, dim // 2 + half])
