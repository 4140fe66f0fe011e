"""A stage-1 model with random parameters, as a checkpoint and as a file of the original training code."""

from pathlib import Path

import pytest
import torch

from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.model.dit import DiT, parameter_groups

CONFIG = {
    "in_dim": 4,
    "dim": 32,
    "cond_dim": 16,
    "num_heads": 2,
    "mlp_ratio": 4,
    "num_blocks": 3,
    "patch_size": 2,
    "base_image_size": 8,
    "num_classes": 5,
}


@pytest.fixture
def stage1() -> Checkpoint:
    """Stage-1 checkpoint with random parameters.

    Its modulations vary smoothly with t, as after training, and every channel affects the output.
    """
    torch.manual_seed(0)
    model = DiT(**CONFIG)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "adaLN" in name or "bias" in name else 0.2)
    model.cond_proj.weight.data.mul_(3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = {}
    for name, parameter in model.named_parameters():
        optimizer[f"{name}.exp_avg"] = torch.randn_like(parameter)
        optimizer[f"{name}.exp_avg_sq"] = torch.rand_like(parameter)
        optimizer[f"{name}.step"] = torch.tensor(8.0)
    average = {name: tensor + 0.001 * torch.randn_like(tensor) for name, tensor in state.items()}
    average |= {name: state[name] for name in ("time_proj.freqs", "pos_embed.div_term")}
    return Checkpoint(
        stage=1,
        step=8,
        config=CONFIG,
        model=state,
        ema=average,
        optimizer=optimizer,
        normalization=Normalization(mean=(0.0,) * 4, std=(1.0,) * 4),
    )


def legacy_content(checkpoint: Checkpoint, prefix: str = "_orig_mod.", dtype: torch.dtype = torch.float32) -> dict:
    """Return the content of the file that the original training code saves for a checkpoint."""
    decayed, undecayed = parameter_groups(DiT(**checkpoint.config))
    state = {
        index: {key: checkpoint.optimizer[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for index, name in enumerate(decayed + undecayed)
    }
    groups = [{"params": list(range(len(decayed)))}, {"params": list(range(len(decayed), len(state)))}]
    return {
        "model": {f"{prefix}{name}": tensor.to(dtype) for name, tensor in checkpoint.model.items()},
        "model_ema": checkpoint.ema,
        "optimizer": {"state": state, "param_groups": groups},
        "step": checkpoint.step - 1,
    }


@pytest.fixture
def legacy_file(stage1: Checkpoint, tmp_path: Path) -> Path:
    """Path of a checkpoint file of the original training code."""
    path = tmp_path / "ckpt.pt"
    torch.save(legacy_content(stage1), path)
    return path
