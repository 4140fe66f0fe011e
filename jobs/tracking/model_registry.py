"""Release of a checkpoint: its EMA weights as a model version in MLflow, with its lineage."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs.reports import lineage, lineage_page
from jobs.state import evaluation
from jobs.state import run as runs
from jobs.state.checkpoint_names import acceptance, checkpoint_record, find_checkpoint
from jobs.state.journal import points, read_journal
from jobs.tracking.mlflow_store import Tracker, run_id
from jobs.tracking.sync import sync_folder
from pixart.atomic import write_atomically
from pixart.relocation import present

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ALIAS = "newest"
FIGURES = ("train/loss", "val/loss", "val/loss_ema")


def release(home: Path, name: str, model: str) -> str:
    """Register the EMA weights of checkpoint `name` as a version of `model`, and return a report for the user.

    Weights that are registered already keep their version. Raises ValueError if `name` is not a checkpoint of a
    training run, StoreError if MLflow rejects the version.
    """
    if not NAME.fullmatch(model):
        raise ValueError(f"--name {model!r}: must consist of letters, digits, dots, dashes and underscores")
    checkpoint = find_checkpoint(name)
    run = checkpoint.parent.parent
    if not (run / runs.RECORD).exists():
        raise ValueError(f"{checkpoint}: not in a run folder; release a checkpoint of a training run")
    record = checkpoint_record(checkpoint)
    tracker = Tracker(run.parent.parent)
    page = checkpoint.parent / f"{checkpoint.name}.lineage.html"
    if not os.access(page.parent, os.W_OK):
        raise ValueError(f"{page.parent}: you may not write there; release the checkpoint as the owner of its run")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "ema"
        command = [sys.executable, "-m", "jobs.tracking.model_registry", str(checkpoint), str(weights)]
        process = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            raise ValueError(f"{checkpoint}: cannot be released; {process.stderr.strip().rpartition(chr(10))[2]}")
        sync_folder(tracker, run)
        write_atomically(page, lineage_page.page(lineage.trace(home, str(checkpoint)), page.parent))
        tags = {
            "sha256": file_hash(next(weights.glob("*.safetensors"))),
            "stage": str(record["stage"]),
            "step": str(record["step"]),
            "checkpoint": str(checkpoint),
            "dataset": str(record["dataset"]),
            "dataset_hash": str(record["provenance"].get("dataset_hash")),
            "converted_from": str(record["provenance"].get("converted_from")),
            "acceptance": str(acceptance(record["provenance"])),
            **{f"metric.{key}": f"{value:.6g}" for key, value in figures(run, record["step"]).items()},
        }
        write_signature(weights, record)
        with tracker.converted_errors():
            version = register(tracker, model, run, weights, page, tags)
            evaluations = attach_evaluations(tracker, home, run, checkpoint)
    attached = f"\nevaluations: {', '.join(evaluations)}" if evaluations else ""
    return (
        f"released: {model} version {version}, the EMA weights of {checkpoint}\nlineage: {page}{attached}\n"
        f"MLflow: {tracker.uri}"
    )


def attach_evaluations(tracker: Tracker, home: Path, run: Path, checkpoint: Path) -> list[str]:
    """Log the results of a checkpoint's evaluations beside its weights, and return their names."""
    identifier = run_id(run)
    assert identifier  # sync_folder has created the MLflow run
    folders = evaluation.of_checkpoint(home, checkpoint)
    for folder in folders:
        for name in (evaluation.RESULTS, evaluation.PAGE):
            target = f"release/{checkpoint.name}/evaluations/{folder.name}"
            tracker.client.log_artifact(identifier, str(folder / name), target)
    return [folder.name for folder in folders]


def figures(run: Path, step: int) -> dict[str, float]:
    """Return the losses that training reported last at or before a step."""
    newest: dict[str, tuple[int, float]] = {}
    for key, value, _, at in points(read_journal(run)[0], set()):
        if key in FIGURES and at <= step and at >= newest.get(key, (0, 0.0))[0]:
            newest[key] = (at, value)
    return {key: value for key, (_, value) in newest.items()}


def write_signature(weights: Path, record: dict[str, Any]) -> None:
    """Write MLflow's description of a model beside the weights: its inputs and outputs with their types and shapes."""
    import numpy as np
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    config, single = record["config"], np.dtype("float32")
    latents = (-1, config["in_dim"], -1, -1)
    inputs: list[ColSpec | TensorSpec] = [TensorSpec(single, latents, "latents"), TensorSpec(single, (-1,), "timestep")]
    if record["stage"] == 1:
        inputs.append(TensorSpec(np.dtype("int64"), (-1,), "label"))
    else:
        inputs.append(TensorSpec(single, (-1, -1, config["text_dim"]), "text_states"))
        inputs.append(TensorSpec(np.dtype("bool"), (-1, -1), "text_mask"))
    signature = ModelSignature(Schema(inputs), Schema([TensorSpec(single, latents, "velocity")]))
    description = {"stage": record["stage"], "step": record["step"], "config": config}
    Model(signature=signature, metadata=description, flavors={"diffusers": {"weights": "EMA"}}).save(
        str(weights / "MLmodel")
    )


def register(tracker: Tracker, model: str, run: Path, weights: Path, page: Path, tags: dict[str, str]) -> str:
    """Return the version of the weights in the model registry, and create it if they have none."""
    from mlflow.exceptions import MlflowException

    client, identifier = tracker.client, run_id(run)
    assert identifier  # sync_folder has created the MLflow run
    try:
        client.get_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(model)
    for version in client.search_model_versions(f"name = '{model}'"):
        if version.tags.get("sha256") == tags["sha256"]:
            return version.version
    folder = f"release/{Path(tags['checkpoint']).name}"
    client.log_artifacts(identifier, str(weights), folder)
    client.log_artifact(identifier, str(page), folder)
    source = f"{client.get_run(identifier).info.artifact_uri}/{folder}"
    words = ", ".join(f"{key.removeprefix('metric.')} {value}" for key, value in tags.items() if "metric." in key)
    description = f"EMA weights of stage {tags['stage']} at step {tags['step']}" + (f": {words}" if words else "")
    version = client.create_model_version(model, source, identifier, tags=tags, description=description)
    client.set_registered_model_alias(model, ALIAS, version.version)
    return version.version


def released_checkpoint(home: Path, model: str, version: str | None, alias: str | None) -> str:
    """Return the checkpoint that a version of a released model was made of; a version is given by number or alias.

    Raises ValueError if MLflow has no such version.
    """
    from mlflow.exceptions import MlflowException

    tracker = Tracker(home)
    name = f"models:/{model}@{alias}" if alias else f"models:/{model}/{version}"
    release = None
    with tracker.converted_errors():
        client = tracker.client
        try:
            if alias:
                release = client.get_model_version_by_alias(model, alias)
            else:
                assert version  # a reference has one of them
                release = client.get_model_version(model, version)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    if release is None:
        raise ValueError(f"{name}: no such release in {tracker.uri}; run 'release' first")
    return present(release.tags["checkpoint"], home)


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(checkpoint: Path, folder: Path) -> None:
    """Write the EMA weights as a diffusers folder. Runs in a separate process, as the launcher imports no torch."""
    from pixart.checkpoint import directory as checkpoints

    loaded = checkpoints.load(checkpoint)
    checkpoints.save_weights(loaded.ema, loaded.config, folder)


if __name__ == "__main__":
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
