"""A recipe: the complete configuration of a run, and its JSON form in run folders.

Imports nothing heavy, so that the launcher can use it.
"""

import dataclasses
import json
from dataclasses import dataclass, field

from pixart.config.dataset import AuditConfig, DataConfig, data_from_dict
from pixart.config.model import ModelConfig
from pixart.config.renamed_keys import rename_recipe
from pixart.config.resolutions import UNSHIFTED
from pixart.config.sampling import EvaluationConfig, SampleConfig
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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def train(self, stage: int) -> TrainConfig:
        """Return the training configuration of stage 1 or 2."""
        return self.stage1 if stage == 1 else self.stage2


def to_json(recipe: Recipe) -> str:
    """Return the JSON text of a recipe, as run folders keep it in `config.json`."""
    return json.dumps(dataclasses.asdict(recipe), indent=2)


def from_json(text: str) -> Recipe:
    """Rebuild the recipe that `to_json` wrote, also in version 0.1.

    Raises json.JSONDecodeError, KeyError or TypeError for a text of another form, and ValueError for a value out of
    range.
    """
    values = rename_recipe(json.loads(text))
    return Recipe(
        name=values["name"],
        data=data_from_dict(values["data"]),
        audit=AuditConfig(**values["audit"]),
        model=ModelConfig(**values["model"]),
        stage1=TrainConfig(**{"time_shift": UNSHIFTED, **values["stage1"]}),
        stage2=TrainConfig(**{"time_shift": UNSHIFTED, **values["stage2"]}),
        sample=SampleConfig(**values["sample"]),
        evaluation=EvaluationConfig(**values.get("evaluation", {})),  # runs of version 0.1 have none
    )
