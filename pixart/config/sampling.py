"""Configuration of sampling."""

from dataclasses import dataclass

from pixart.config.limits import require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How the sample job generates images. Raises ValueError naming the field for a value out of range."""

    steps: int = 20
    """Number of Euler steps of an image."""

    guidance: float = 4.5
    """Scale of classifier-free guidance; 1 samples without guidance."""

    seed: int = 0
    """Random seed of the first image; the k-th image of a run has the seed plus k."""

    count: int = 64
    """Number of prompts or classes taken from the dataset when the command names none."""

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, count=self.count)
        require_at_least(0, seed=self.seed, guidance=self.guidance)
