"""PixArt's diffusion transformer, class-conditional (stage 1) or text-conditional (stage 2)."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from pixart.model.layers import Block, PositionEmbedding, QKNorm, TimeEmbedding, layer_norm, modulate


class DiT(ModelMixin, ConfigMixin):
    """Diffusion transformer that predicts the velocity of rectified flow from a noised latent.

    Stage 1 is selected by `num_classes` (DiT with adaLN-zero), stage 2 by `text_dim` (adaLN-single and
    cross-attention, PixArt-alpha section 2.3). The last class index is the null class, "no class". `qk_norm_eps` and
    `qk_norm_bias` are the variant of the norm of queries and keys (`layers.QKNorm`) that a checkpoint was trained with.

    Raises ValueError unless exactly one of `num_classes` and `text_dim` is passed.
    """

    _supports_gradient_checkpointing = True  # diffusers' `enable_gradient_checkpointing`, block by block

    @register_to_config
    def __init__(
        self,
        *,
        in_dim: int = 16,
        dim: int = 1152,
        cond_dim: int = 256,
        num_heads: int = 16,
        mlp_ratio: int = 4,
        num_blocks: int = 28,
        patch_size: int = 2,
        base_image_size: int = 32,
        num_classes: int | None = None,
        text_dim: int | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_bias: bool = False,
    ) -> None:
        super().__init__()
        if (num_classes is None) == (text_dim is None):
            raise ValueError(f"{num_classes=}, {text_dim=}: pass either num_classes (stage 1) or text_dim (stage 2)")
        self.patchify = nn.Conv2d(in_dim, dim, kernel_size=patch_size, stride=patch_size)
        if num_classes is not None:
            self.cond_proj = nn.Embedding(num_classes, cond_dim)
        self.time_proj = TimeEmbedding(cond_dim)
        block_cond_dim = cond_dim if text_dim is None else None
        self.dit_blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, block_cond_dim, text_dim, QKNorm(eps=qk_norm_eps, bias=qk_norm_bias))
            for _ in range(num_blocks)
        )
        self.linear_out = nn.Linear(dim, patch_size**2 * in_dim)
        self.pos_embed = PositionEmbedding(dim, base_grid=base_image_size // patch_size)
        self.adaLN1 = nn.Linear(cond_dim, dim)
        self.adaLN2 = nn.Linear(dim, 2 * dim)
        if text_dim is not None:
            self.adaLN1_single = nn.Linear(cond_dim, dim)
            self.adaLN2_single = nn.Linear(dim, 6 * dim)
        self.gradient_checkpointing = False
        self.initialize_weights()

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in their order."""
        return cast(list[Block], list(self.dit_blocks))

    @property
    def stage(self) -> int:
        """Training stage of the configuration: 1 (class-conditional) or 2 (text-conditional)."""
        return 1 if self.config.text_dim is None else 2

    def initialize_weights(self) -> None:
        """Initialize linears with Xavier; zero those that make a new block the identity and the output zero (DiT)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if name.endswith(("adaLN2", "adaLN2_single", "linear_out", "cross_attention.out_proj")):
                nn.init.zeros_(module.weight)
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        weight = self.patchify.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.patchify.bias))

    def fuse_projections(self) -> None:
        """Compute the projections of the same input as one GEMM; results differ in rounding only.

        This is for training: hooks on the individual linears are not called.
        """
        for block in self.blocks:
            for attention in (block.attention.attention, getattr(block, "cross_attention", None)):
                if attention is not None:
                    attention.fused_projections = True

    def embed_condition(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Return the embedding (B, cond_dim) of the time t (B,) in [0, 1] and, in stage 1, the label (B,)."""
        time = self.time_proj(t).to(self.adaLN1.weight.dtype)
        return time if label is None else time + self.cond_proj(label)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (B, C, H, W) of a noised latent x (B, C, H, W) at time t (B,) in [0, 1].

        Stage 1 takes `label` (B,); stage 2 takes `text` (B, L, text_dim) and `text_mask` (B, L), true for its tokens.
        """
        dtype = self.patchify.weight.dtype
        patch = self.config.patch_size
        height, width = x.shape[-2] // patch, x.shape[-1] // patch
        tokens = rearrange(self.patchify(x.to(dtype)), "b d h w -> b (h w) d")
        tokens = tokens + self.pos_embed(height, width).to(dtype)

        condition = self.embed_condition(t, label)
        if text is None:
            block_condition = condition
        else:
            block_condition = self.adaLN2_single(F.silu(self.adaLN1_single(condition)))
            text = text.to(dtype)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.dit_blocks:
            run = functools.partial(self._gradient_checkpointing_func, block) if recompute else block
            tokens = run(tokens, block_condition, text, text_mask)

        gamma, beta = self.adaLN2(F.silu(self.adaLN1(condition))).chunk(2, dim=-1)
        output = self.linear_out(modulate(layer_norm(tokens), gamma, beta))
        return rearrange(output, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a DiT configuration without the private keys that diffusers adds."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def state_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a DiT's state dictionary by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(**config).state_dict().items()}


def load_model(config: Mapping[str, Any], state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> DiT:
    """Return a DiT that shares the tensors of `state`; those on another device are copied to `device`."""
    with torch.device("meta"):
        model = DiT(**config)
    model.load_state_dict(dict(state), strict=True, assign=True)
    return model.to(device)


def parameter_groups(model: nn.Module, *, decay_qk_norm: bool = False) -> tuple[list[str], list[str]]:
    """Return the names of the parameters with and without weight decay, each in the order of AdamW's state.

    Weight decay applies to all parameters but biases and those of normalizations and embeddings. With `decay_qk_norm`
    it also applies to the weights of the RMSNorms, which are those of queries and keys.
    """
    decayed: list[str] = []
    undecayed: list[str] = []
    exempt = (nn.LayerNorm, nn.Embedding) if decay_qk_norm else (nn.LayerNorm, nn.RMSNorm, nn.Embedding)
    for module_name, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}" if module_name else name
            (undecayed if name == "bias" or isinstance(module, exempt) else decayed).append(full)
    return decayed, undecayed


def null_labels(model: DiT, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the null class, "no class", for each of `batch` images -> (batch,)."""
    return torch.full((batch,), model.config.num_classes - 1, device=device)
