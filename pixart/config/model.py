"""Configuration of the model's architecture."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pixart.config.limits import require_at_least

CHECKPOINT_NAMES = {"base_latent_size": "base_image_size"}  # the sizes that checkpoints keep under another name


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes of the diffusion transformer in both stages; the defaults are those of PixArt-alpha XL/2.

    Raises ValueError naming the field for a size below 1.
    """

    in_dim: int = 16
    """Number of latent channels of the VAE."""

    dim: int = 1152
    """Width of the transformer; a multiple of 4 and of num_heads."""

    cond_dim: int = 256
    """Width of the embeddings of the timestep and of the class; an even number."""

    num_heads: int = 16
    """Number of attention heads."""

    mlp_ratio: int = 4
    """Hidden width of the MLPs as a multiple of `dim`."""

    num_blocks: int = 28
    """Number of transformer blocks."""

    patch_size: int = 2
    """Side of a patch, in latent pixels."""

    base_latent_size: int = 32
    """Side of the latents at the resolution that position embeddings are scaled to, in latent pixels."""

    num_classes: int = 1001
    """Number of classes in stage 1, including the null class, which has the last index."""

    def __post_init__(self) -> None:
        require_at_least(1, **dataclasses.asdict(self))

    def dit_arguments(self) -> dict[str, int]:
        """Return the sizes as keyword arguments of `DiT`, by the names that checkpoints keep."""
        return {CHECKPOINT_NAMES.get(name, name): size for name, size in dataclasses.asdict(self).items()}

    @classmethod
    def of_checkpoint(cls, config: Mapping[str, Any]) -> Self:
        """Return the sizes in the configuration of a `DiT`, by the names that checkpoints keep.

        A model of stage 2 has no classes, whose number is then the default.
        """
        named = {name: config.get(CHECKPOINT_NAMES.get(name, name)) for name in cls.__dataclass_fields__}
        return cls(**{name: size for name, size in named.items() if size is not None})
