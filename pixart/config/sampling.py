"""How pictures are sampled."""

from dataclasses import dataclass

from pixart.config.limits import require_at_least


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How pictures are sampled and, for the demo's scenes, counted."""

    steps: int = 20  # Euler
    guidance: float = 4.5
    seed: int = 0
    count: int = 64  # prompts taken from the dataset where none are given

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, count=self.count)
        require_at_least(0, seed=self.seed, guidance=self.guidance)
