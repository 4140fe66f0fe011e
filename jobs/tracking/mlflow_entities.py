"""What MLflow shows of a run, under the names that its page knows: parameters, metrics, dataset, experiment kind."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.state import ledger
from jobs.state.run_metadata import CONFIGURATION, flattened
from pixart.config.dataset import is_url

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the page of experiments that train models
MAX_PARAMETER_LENGTH = 6000  # characters of a value, MLflow's limit
MAX_KEY_LENGTH = 250
MAX_BATCH_PARAMETERS = 100
MAX_DIGEST_LENGTH = 36
QUEUE = "system/queue_seconds"
# Metrics of a run that its submission shows too: the pattern, and the group of the name there.
KEY_FIGURES = re.compile(r"train/(?:loss|images_per_second)|val/.*|eval/.*|data/(?:images|num_valid|images_per_second)")
FIRST_NODE = re.compile(r"system/node_0/(.*)")


def mlflow_key(key: str) -> str:
    """Return the name of a metric in MLflow: the first node's system metrics as MLflow names those of one node.

    The groups of its page are in alphabetical order, so the metrics of FP8 are in a group of `train/`, which is first.
    """
    if match := FIRST_NODE.fullmatch(key):
        return f"system/{match[1]}"
    return f"train/{key}" if key.startswith("fp8/") else key


def parent_key(key: str, label: str) -> str | None:
    """Return the name under which a submission shows a metric of the run `label`; None if it does not show it."""
    if not KEY_FIGURES.fullmatch(key):
        return None
    group, _, name = key.partition("/")
    return f"{group}/{label}_{name}"


def run_label(job: str, parameters: Mapping[str, Any]) -> str:
    """Return the word that distinguishes the runs of a submission: the kind of job, or the stage of training."""
    return f"stage_{parameters['stage']}" if job == "train" and "stage" in parameters else job


def parameters(run: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's parameters: those of its description and its whole configuration by dotted key.

    Values are cut to the length that MLflow takes; the artifact `config.json` has them in full.
    """
    values = dict(described)
    if (configuration := run / CONFIGURATION).exists():
        values = flattened(json.loads(configuration.read_bytes())) | values
    return {key: str(value)[:MAX_PARAMETER_LENGTH] for key, value in values.items() if len(key) <= MAX_KEY_LENGTH}


def dataset_inputs(dataset: str, job: str) -> list["DatasetInput"]:
    """Return the dataset of a run as MLflow's dataset tracking takes it; none if it does not exist any longer.

    Built of MLflow's entities alone: importing `mlflow.data` takes seconds.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    try:
        manifest = ledger.manifest(dataset)
    except ValueError:  # damaged: the run itself reports it
        return []
    if manifest is None:
        return []
    data = manifest["data"]
    source = {"uri": dataset} if is_url(dataset) else {"uri": Path(dataset).as_uri()}
    profile = {"num_rows": manifest["images"], "num_shards": data["num_shards"], "image_size": data["image_size"]}
    entity = Dataset(
        name=Path(dataset).name,
        digest=manifest["hash"][:MAX_DIGEST_LENGTH],
        source_type="http" if is_url(dataset) else "local",
        source=json.dumps(source),
        profile=json.dumps(profile | {"source": data["source"], "captioner": data["captioner"]}),
    )
    context = {"train": "training", "evaluate": "evaluation", "judge": "evaluation"}.get(job, job)
    return [DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", context)])]
