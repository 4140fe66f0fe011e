"""A release: a checkpoint's averaged weights as a model version in MLflow, with what it comes from."""

import hashlib
import json
import re
from pathlib import Path

from jobs import lineage, lineage_page, runs
from jobs.checkpoints import MARKER, find_checkpoint
from jobs.ledger import write_atomically
from jobs.publish import publish
from jobs.tracking import Tracker, run_id

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
WEIGHTS = "ema"  # a diffusers folder
ALIAS = "newest"


def release(home: Path, name: str, model: str) -> str:
    """What was done, in words. The same weights are one version, however often they are released.

    Raises ValueError for what is no checkpoint of a training run, StoreError where MLflow does not take it.
    """
    if not NAME.fullmatch(model):
        raise ValueError(f"--name {model!r}: may have letters, digits, dots, dashes and underscores")
    checkpoint = find_checkpoint(name)
    run = checkpoint.parents[1]
    if not (run / runs.RECORD).exists():
        raise ValueError(f"{checkpoint} lies in no run folder: what is released comes from a training run")
    record = json.loads((checkpoint / MARKER).read_text())
    digest = file_hash(next((checkpoint / WEIGHTS).glob("*.safetensors")))
    tracker = Tracker(run.parents[1])
    publish(tracker, run)
    page = checkpoint.parent / f"{checkpoint.name}.lineage.html"
    write_atomically(page, lineage_page.page(lineage.trace(home, str(checkpoint)), page.parent))
    with tracker.opened():
        version = register(tracker, model, run, checkpoint, page, {
            "sha256": digest,
            "stage": str(record["stage"]),
            "step": str(record["step"]),
            "checkpoint": str(checkpoint),
            "dataset": str(record["dataset"]),
            "dataset_hash": str(record["provenance"].get("dataset_hash")),
            "converted_from": str(record["provenance"].get("converted_from")),
            "gate": str(record["provenance"].get("gate")),
        })  # fmt: skip
    return f"released: {model} version {version}, {checkpoint}/{WEIGHTS}\nlineage: {page}\nMLflow: {tracker.uri}"


def register(tracker: Tracker, model: str, run: Path, checkpoint: Path, page: Path, tags: dict[str, str]) -> str:
    """The number of the version, which is made unless these weights have one."""
    from mlflow.exceptions import MlflowException

    client, identifier = tracker.client, run_id(run)
    assert identifier  # the run has just been published
    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)
    for version in client.search_model_versions(f"name = '{model}'"):
        if version.tags.get("sha256") == tags["sha256"]:
            return version.version
    folder = f"release/{checkpoint.name}"
    client.log_artifacts(identifier, str(checkpoint / WEIGHTS), folder)
    client.log_artifact(identifier, str(page), folder)
    source = f"{client.get_run(identifier).info.artifact_uri}/{folder}"
    version = client.create_model_version(model, source, identifier, tags=tags)
    client.set_registered_model_alias(model, ALIAS, version.version)
    return version.version


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
