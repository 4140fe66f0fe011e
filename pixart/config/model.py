"""Sizes of the model."""

import dataclasses
from dataclasses import dataclass

from pixart.config.limits import require_at_least

CHECKPOINT_NAMES = {"base_latent_size": "base_image_size"}  # of the sizes whose name in a checkpoint is another


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes that stage 1 and stage 2 share; defaults are the real run's (PixArt-alpha XL/2)."""

    in_dim: int = 16  # latent channels
    dim: int = 1152
    cond_dim: int = 256
    num_heads: int = 16
    mlp_ratio: int = 4
    num_blocks: int = 28
    patch_size: int = 2
    base_latent_size: int = 32  # latent side at the reference resolution
    num_classes: int = 1001  # of stage 1; the last index means "no class"

    def __post_init__(self) -> None:
        require_at_least(1, **dataclasses.asdict(self))

    def dit_arguments(self) -> dict[str, int]:
        """Return the sizes under the names of DiT's arguments, which checkpoints keep as the model's configuration."""
        return {CHECKPOINT_NAMES.get(name, name): size for name, size in dataclasses.asdict(self).items()}
