"""Training files of the original stages with TransformerEngine, made with stand-ins for the library's modules.

The stand-ins have the parameters, the keys and the class hierarchy of the library's: its RMSNorm is no `nn.RMSNorm`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pixart.model.dit import DiT

EPS = 1e-5
SIZES = {"in_dim": 16, "dim": 32, "cond_dim": 32, "num_heads": 2, "num_blocks": 2, "base_image_size": 8}
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.03


class ExtraState(nn.Module):
    """Module with an entry `_extra_state` in its state dictionary, empty as with MXFP8."""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert state.numel() == 0


class Linear(ExtraState, nn.Linear):
    """Stand-in for `te.Linear`."""


class DotProductAttention(ExtraState):
    """Stand-in for `te.DotProductAttention`, which has no parameters."""


class RMSNorm(ExtraState):
    """Stand-in for `te.RMSNorm`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.weight


def original_model(stage: int, *, text_dim: int = 24, transformer_engine: bool = True) -> DiT:
    """Return a model of the original training with random weights, whose norms are large enough for eps to matter."""
    model = DiT(**SIZES, **({"num_classes": 5} if stage == 1 else {"text_dim": text_dim}))
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        if transformer_engine and isinstance(module, nn.Linear):
            setattr(parent, child, Linear(module.in_features, module.out_features))
        if transformer_engine and isinstance(module, nn.RMSNorm):
            setattr(parent, child, RMSNorm(module.normalized_shape[0]))
        if transformer_engine and child == "k_norm":
            parent.add_module("attention", DotProductAttention())
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.1 if "adaLN" in name or "bias" in name else 0.2)
        if "q_proj" in name or "k_proj" in name:
            nn.init.normal_(parameter, std=0.01)
    return model


def make_inputs(model: DiT) -> dict[str, Tensor]:
    """Return inputs of two images with the condition of the model's stage."""
    inputs = {"x": torch.randn(2, 16, 8, 8), "t": torch.rand(2)}
    if model.stage == 1:
        return {**inputs, "label": torch.tensor([1, 4])}
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    return {**inputs, "text": torch.randn(2, 6, model.config.text_dim), "text_mask": mask}


def original_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with the parameter groups of the original training."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for module in model.modules():
        is_exempt = isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False):
            groups[name == "bias" or is_exempt].append(parameter)
    settings = zip(groups, (WEIGHT_DECAY, 0.0), strict=True)
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in settings], lr=LEARNING_RATE, eps=1e-15
    )


def train_original(model: DiT, steps: int = 3) -> dict[str, Any]:
    """Train a model for some steps and return the content of the file that the original training saves."""
    optimizer = original_optimizer(model)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(steps):
        inputs = make_inputs(model)
        (model(**inputs) - inputs["x"]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            average[name].lerp_(parameter.detach(), 0.5)
    return {
        "model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
        "model_ema": average,
        "optimizer": optimizer.state_dict(),
        "step": steps - 1,
    }
