"""Parameters and floating-point operations of the diffusion transformer, from its sizes alone.

Imports nothing heavy, so that the launcher can use it; the tests compare it with the model and with PyTorch's counter.

With D the width, N the image tokens, L the text tokens and T the width of their embeddings, the forward pass of one
image takes per block

- 2 N (4 D^2 + 2 r D^2) operations in the linears of self-attention and of the MLP, whose hidden width is r D,
- 4 N^2 D in self-attention, and
- in stage 2 also 2 N 2 D^2 + 2 L 2 T D in the linears of cross-attention, and 4 N L D in cross-attention.

The backward pass takes twice as many, except for linears whose input needs no gradient, which take as many.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixart.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Operations:
    """Floating-point operations of one image, of which those of the blocks' linears can be in FP8."""

    block_linears: int
    other: int

    @property
    def total(self) -> int:
        return self.block_linears + self.other


def num_parameters(model: ModelConfig, stage: int, text_dim: int) -> int:
    """Return the number of parameters of a stage's model; `text_dim` is the width of the text embeddings."""
    dim, cond_dim, hidden = model.dim, model.cond_dim, model.mlp_ratio * model.dim
    head_dim, patch_values = dim // model.num_heads, model.patch_size**2 * model.in_dim
    attention = 4 * linear(dim, dim) + 2 * head_dim
    block = attention + linear(dim, hidden) + linear(hidden, dim)
    shared = linear(patch_values, dim) + linear(dim, patch_values) + linear(cond_dim, dim) + linear(dim, 2 * dim)
    modulation = linear(cond_dim, dim) + linear(dim, 6 * dim)
    if stage == 1:
        return shared + model.num_classes * cond_dim + model.num_blocks * (block + modulation)
    cross_attention = 2 * linear(dim, dim) + 2 * linear(text_dim, dim) + 2 * head_dim
    return shared + modulation + model.num_blocks * (block + cross_attention + 6 * dim)


def linear(inputs: int, outputs: int) -> int:
    """Return the number of parameters of a linear with a bias."""
    return inputs * outputs + outputs


def training_operations(model: ModelConfig, stage: int, pixels: int, text_tokens: int, text_dim: int) -> Operations:
    """Return the operations of one image's forward and backward pass.

    The latent has `pixels` pixels in all, and the caption `text_tokens` tokens of width `text_dim`.
    """
    dim, cond_dim = model.dim, model.cond_dim
    tokens, patch_values = pixels // model.patch_size**2, model.patch_size**2 * model.in_dim
    linears = 3 * 2 * tokens * (4 + 2 * model.mlp_ratio) * dim**2
    attention = 3 * 4 * tokens**2 * dim
    modulation = 3 * 2 * 6 * dim**2
    # The patches and the texts need no gradient, and neither does the time: only a class does.
    ends = (2 + 3) * 2 * tokens * patch_values * dim + 3 * 2 * 2 * dim**2
    if stage == 1:
        modulation += 3 * 2 * cond_dim * dim
        other = ends + 3 * 2 * cond_dim * dim + model.num_blocks * (attention + modulation)
        return Operations(block_linears=model.num_blocks * linears, other=other)
    linears += 3 * 2 * tokens * 2 * dim**2 + 2 * 2 * text_tokens * 2 * text_dim * dim
    attention += 3 * 4 * tokens * text_tokens * dim
    other = ends + 2 * 2 * 2 * cond_dim * dim + modulation + model.num_blocks * attention
    return Operations(block_linears=model.num_blocks * linears, other=other)


def text_encoder_operations(config: Mapping[str, Any], tokens: int) -> int:
    """Return the operations of encoding one caption of `tokens` tokens.

    `config` is the configuration of an encoder in the names of transformers: of BERT, T5 or Gemma's kind. The layers
    are counted; embeddings and norms are negligible.

    Raises KeyError for a configuration with other names.
    """
    dim = config.get("hidden_size") or config["d_model"]
    layers = config.get("num_hidden_layers") or config["num_layers"]
    heads = config.get("num_attention_heads") or config["num_heads"]
    hidden = config.get("intermediate_size") or config["d_ff"]
    head_dim = config.get("head_dim") or config.get("d_kv") or dim // heads
    key_value_heads = config.get("num_key_value_heads") or heads
    gated = "gemma" in config.get("model_type", "") or config.get("feed_forward_proj", "").startswith("gated")
    projections = 2 * dim * head_dim * (heads + key_value_heads)
    weights = projections + (3 if gated else 2) * dim * hidden
    return layers * (2 * tokens * weights + 4 * tokens**2 * heads * head_dim)
