"""A recipe: the complete configuration of a run, and its JSON form in run folders.

Imports nothing heavy, so that the launcher can use it.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart import records
from pixart.config.dataset import AuditConfig, DataConfig
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


def from_json(text: str, name: str = "recipe") -> Recipe:
    """Rebuild the recipe that `to_json` wrote, also in version 0.1; `name` is that of its file, for errors.

    Raises ValueError for a text of another form and for a value out of range.
    """
    values = records.parse(text, dict[str, Any], name)
    try:
        renamed = rename_recipe(values)
        renamed |= {stage: {"time_shift": UNSHIFTED, **renamed[stage]} for stage in ("stage1", "stage2")}
    except (TypeError, LookupError) as error:
        raise ValueError(f"{name}: is damaged or of another version, {error!r}; restore it") from None
    return records.convert(renamed, Recipe, name)  # runs of version 0.1 have no section `evaluation`


def load(file: Path) -> Recipe:
    """Return the recipe in a file. Raises ValueError as `from_json` does, and OSError if it cannot be read."""
    return from_json(records.decode(records.read_limited(file), str(file)), str(file))
