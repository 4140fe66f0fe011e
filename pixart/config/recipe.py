"""A recipe: the whole configuration of a run, and how it is written and read back.

Imports neither torch nor anything heavy, so that the launcher may read it.
"""

import dataclasses
import json
from dataclasses import dataclass

from pixart.config.audit import AuditConfig
from pixart.config.dataset import DataConfig, read_data
from pixart.config.model import ModelConfig
from pixart.config.renamed_keys import rename_recipe
from pixart.config.sampling import SampleConfig
from pixart.config.training import TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a run depends on, except the cluster."""

    name: str
    data: DataConfig
    audit: AuditConfig
    model: ModelConfig
    stage1: TrainConfig
    stage2: TrainConfig
    sample: SampleConfig

    def train(self, stage: int) -> TrainConfig:
        return self.stage1 if stage == 1 else self.stage2


def to_json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), indent=2)


def from_json(text: str) -> Recipe:
    """Rebuilds the recipe that `to_json` wrote; unknown fields raise TypeError."""
    values = rename_recipe(json.loads(text))
    return Recipe(
        name=values["name"],
        data=read_data(values["data"]),
        audit=AuditConfig(**values["audit"]),
        model=ModelConfig(**values["model"]),
        stage1=TrainConfig(**values["stage1"]),
        stage2=TrainConfig(**values["stage2"]),
        sample=SampleConfig(**values["sample"]),
    )
