"""Synchronization of run folders with MLflow.

Tasks append metrics to the journal of their run folder, so that they need no connection to the tracking server; the
launcher writes the metadata and the final status. Synchronization can fail, be killed and be repeated without logging
a point twice: MLflow's stores deduplicate points of the same key, step, value and time, and the points of a journal
never change.
"""

import functools
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from jobs.state import run_metadata
from jobs.state.journal import points, read_journal
from jobs.state.run_metadata import KEY, read_description, status_of, tags_of, work_times
from jobs.tracking.embedded_store import ARTIFACTS, EMBEDDED, EXPERIMENT, move_artifacts, same_store, store_uri
from jobs.tracking.mlflow_entities import (
    CONFIGURATION,
    EXPERIMENT_TAGS,
    MAX_BATCH_PARAMETERS,
    QUEUE,
    dataset_inputs,
    mlflow_key,
    parameters,
    parent_key,
    run_label,
)
from pixart import records
from pixart.atomic import file_lock, write_atomically
from pixart.records import Count
from pixart.relocation import home_of, present

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

STATE = "mlflow.json"  # synchronization state of a run
LOG = "tracking.log"
LOCK = ".mlflow.lock"
STORE_ATTEMPTS = 5  # to open a database, with pauses of 2.6 s in all; MLflow's own 10 attempts take 100 s
REFUSED_STATUSES = (400, 403, 404, 405, 411, 413, 414, 415, 422)
REFUSAL = re.compile(r"\b(?:413|request entity too large|entitytoolarge)\b", re.IGNORECASE)
TIMESTAMP = re.compile(r"^[0-9]{8}-[0-9]{6}-")  # in the name of a run folder; MLflow has a column for it
MAX_BATCH_SIZE = 1000  # metrics per request, MLflow's limit
PREVIEW = re.compile(r"step-([0-9]+)\.png")
THUMBNAIL_PIXELS = 256  # longest side of the thumbnails on MLflow's page
# A failed request is repeated by the next synchronization; MLflow's default of eight tries would block a progress line
# for minutes.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "1",
}


class SyncState(TypedDict):
    """The synchronization state of a run; offsets are bytes of its journal's files."""

    uri: str
    run_id: str
    offsets: dict[str, Count]
    sending: dict[str, Count] | None
    tags: dict[str, str]
    status: str | None
    artifacts: NotRequired[list[tuple[str, float]]]


class StoreError(Exception):
    """MLflow cannot be reached or rejects a request; the message is one line."""


def needs_sync(run: Path) -> bool:
    """Return whether a run has data that was not sent to MLflow yet; reads the saved state, not MLflow."""
    if not (run / run_metadata.FILE).exists():
        return False
    if not (run / STATE).exists():
        return work_times(run)[0] is not None
    state = read_state(run)
    sent = (state["offsets"], state["status"], state["artifacts"])
    return sent != (read_journal(run, state["offsets"])[1], status_of(run), [])


class Tracker:
    """The MLflow store of a home folder: the server that MLFLOW_TRACKING_URI names, else an embedded sqlite file."""

    def __init__(self, home: str | Path) -> None:
        self.home = Path(home).absolute()
        self.uri = store_uri(self.home)
        self.seen: dict[Path, tuple[dict[str, int], set[tuple[str, int]]]] = {}

    @functools.cached_property
    def client(self) -> "MlflowClient":
        for name, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        from mlflow.store.db import utils
        from mlflow.tracking import MlflowClient

        utils.MAX_RETRY_COUNT = STORE_ATTEMPTS
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            move_artifacts(self.home)
        for name in ("mlflow", "alembic"):  # they log each migration of a new store
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(self.uri, registry_uri=self.uri)

    @functools.cached_property
    def experiment(self) -> str:
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            for key, value in EXPERIMENT_TAGS.items():  # a store of an earlier version has no kind
                if key not in experiment.tags:
                    self.client.set_experiment_tag(experiment.experiment_id, key, value)
            return experiment.experiment_id
        location = (self.home / ARTIFACTS).as_uri() if self.uri.startswith("sqlite") else None
        return self.client.create_experiment(EXPERIMENT, artifact_location=location, tags=EXPERIMENT_TAGS)

    @contextmanager
    def converted_errors(self) -> Iterator[None]:
        """Convert errors to StoreError: those of MLflow, and of a database or an artifact store that it uses.

        Hold a lock on an embedded store meanwhile, because the first process creates and migrates it.
        """
        embedded = not self.uri.startswith("http")
        try:
            with file_lock(self.home / LOCK) if embedded else nullcontext():
                yield
        except StoreError:
            raise
        except Exception as error:  # such as a missing driver, an unknown scheme, no permission or no credentials
            raise StoreError(f"MLflow at {self.uri}: request failed; {describe_error(error)}") from error

    def sync(self, run: Path) -> None:
        """Send the unsent data of a run and of its parent submission. Raises StoreError if MLflow rejects it."""
        with self.converted_errors():
            parent = read_description(run)["parent"]
            if parent and (Path(parent) / run_metadata.FILE).exists():
                self.sync_run(Path(parent))
            self.sync_run(run)

    def sync_run(self, run: Path) -> None:
        """Send the new journal lines, tags and status of one run, and save the synchronization state."""
        with file_lock(run / LOCK):
            state = self.state(run)
            if state is None:
                return
            self.replay(run, state)
            self.send_artifacts(run, state)
            tags = {key: value for key, value in tags_of(run).items() if state["tags"].get(key) != value}
            for key, value in tags.items():
                self.client.set_tag(state["run_id"], key, value)
            status = status_of(run)
            if status != state["status"] and status == "RUNNING":
                self.client.update_run(state["run_id"], status="RUNNING")
            elif status != state["status"]:
                ended = work_times(run)[1]
                assert ended is not None  # the status is final
                self.client.set_terminated(state["run_id"], status, end_time=milliseconds(ended))
            if tags or status != state["status"]:
                save(run, {**state, "tags": {**state["tags"], **tags}, "status": status})

    def state(self, run: Path) -> dict[str, Any] | None:
        """Return the synchronization state of a run; None before its work has begun, or if a user has deleted it.

        The MLflow run is created if the store does not have it, and not before: its start cannot be changed later.
        """
        if (run / STATE).exists():
            state = read_state(run)
            lifecycle_stage = self.lifecycle_stage(state["run_id"]) if same_store(state["uri"], self.uri) else None
            if lifecycle_stage == "deleted":
                return None
            if lifecycle_stage == "active":
                return state
        if work_times(run)[0] is None:
            return None
        uri = self.uri if os.environ.get("MLFLOW_TRACKING_URI") else EMBEDDED  # which moves with the home
        state = {"uri": uri, "run_id": self.find_or_create(run), "offsets": {}, "sending": None, "tags": {}}
        configuration = run / CONFIGURATION
        state["artifacts"] = [[str(configuration), 0.0]] if configuration.exists() else []
        save(run, {**state, "status": "RUNNING"})
        return {**state, "status": "RUNNING"}

    def lifecycle_stage(self, identifier: str) -> str | None:
        """Return MLflow's lifecycle stage, "active" or "deleted"; None if the store does not have the run."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(identifier).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def find_or_create(self, run: Path) -> str:
        """Return the id of the MLflow run with the run's key, and create it if it does not exist.

        It can exist without a saved id, if a process was killed after creating it.
        """
        from mlflow.entities import Metric, Param

        metadata = read_description(run)
        begin = work_times(run)[0]
        assert begin is not None  # `state` has seen it
        job, logged = metadata["tags"].get("pixart.job", ""), {}
        matches = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{metadata['key']}'", max_results=1)
        if matches:
            identifier, logged = matches[0].info.run_id, matches[0].data.params
        else:
            tags = {KEY: metadata["key"]}
            if metadata["parent"] and (parent := run_id(metadata["parent"])):
                tags["mlflow.parentRunId"] = parent
            identifier = self.client.create_run(
                self.experiment, milliseconds(begin), run_name=TIMESTAMP.sub("", run.name), tags=tags
            ).info.run_id
        values = {key: value for key, value in parameters(run, metadata["parameters"]).items() if key not in logged}
        entities = [Param(key, value) for key, value in values.items()]
        for first in range(0, len(entities), MAX_BATCH_PARAMETERS):
            self.client.log_batch(identifier, params=entities[first : first + MAX_BATCH_PARAMETERS])
        queued = [Metric(QUEUE, max(0.0, begin - metadata["begun"]), milliseconds(begin), 0)]
        self.client.log_batch(identifier, metrics=queued)
        if dataset := metadata["tags"].get("pixart.dataset"):
            self.client.log_inputs(identifier, dataset_inputs(dataset, job))
        return identifier

    def replay(self, run: Path, state: dict[str, Any]) -> None:
        """Send the new lines of the journal.

        The offsets to send up to are saved first: after a kill exactly these lines are sent again, so that the same
        one of two lines for a step takes effect.
        """
        while True:
            interrupted = state["sending"]
            lines, ends = read_journal(run, state["offsets"], interrupted)
            if ends == state["offsets"]:
                return
            state["sending"] = ends
            save(run, state)
            self.send(run, state, lines)
            state |= {"offsets": ends, "sending": None}
            save(run, state)
            if not interrupted:
                return

    def send(self, run: Path, state: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Send metrics, tags, incidents and artifacts of journal lines."""
        from mlflow.entities import Metric

        identifier = state["run_id"]
        offsets, seen = self.seen.pop(run, ({}, set()))  # stays removed if sending fails
        if offsets != state["offsets"]:
            seen = set()
            list(points(read_journal(run, None, state["offsets"])[0], seen))
        new = list(points(lines, seen))
        metrics = [Metric(mlflow_key(key), value, milliseconds(moment), step) for key, value, moment, step in new]
        self.log_metrics(identifier, metrics)
        metadata = read_description(run)
        if metadata["parent"] and (parent := run_id(metadata["parent"])) and self.lifecycle_stage(parent) == "active":
            label = run_label(metadata["tags"].get("pixart.job", "run"), metadata["parameters"])
            shown = [
                Metric(name, value, milliseconds(moment), step)
                for key, value, moment, step in new
                if (name := parent_key(key, label))
            ]
            self.log_metrics(parent, shown)
        for line in lines:
            for key, value in line.get("tags", {}).items():
                self.client.set_tag(identifier, key, value)
            if "incident" in line:
                self.client.set_tag(identifier, "pixart.last_incident", f"step {line['step']}: {line['incident']}")
            if "artifact" in line and [line["artifact"], line["time"]] not in state["artifacts"]:
                state["artifacts"].append([line["artifact"], line["time"]])  # translated when they are sent
        self.seen[run] = (dict(state["sending"]), seen)

    def log_metrics(self, identifier: str, metrics: list["Metric"]) -> None:
        """Log metrics in requests of the size that MLflow takes."""
        for begin in range(0, len(metrics), MAX_BATCH_SIZE):
            self.client.log_batch(identifier, metrics=metrics[begin : begin + MAX_BATCH_SIZE])

    def send_artifacts(self, run: Path, state: dict[str, Any]) -> None:
        """Send the files that are waiting; metrics and tags do not wait for them.

        A file that the store refuses for good is noted in the run's log and skipped. Raises StoreError if another one
        cannot be sent now; it is sent by the next synchronization.
        """
        failure: StoreError | None = None
        for path, moment in list(state["artifacts"]):
            try:
                file = Path(present(path, home_of(run)))
                if file.is_file():  # it may have been removed since
                    self.send_file(state["run_id"], file, moment)
            except Exception as error:
                message = f"MLflow at {self.uri}: {path} cannot be sent; {describe_error(error)}"
                if not is_refusal(error):
                    failure = StoreError(message)
                    continue
                with (run / LOG).open("a") as log:
                    log.write(f"{message}; it is skipped\n")
            state["artifacts"].remove([path, moment])
            save(run, state)
        if failure:
            raise failure

    def send_file(self, identifier: str, file: Path, moment: float) -> None:
        """Log a file as an artifact; a preview under the names by which MLflow's page shows images by step.

        The names are deterministic, so that a repeated upload replaces the first.
        """
        match = PREVIEW.fullmatch(file.name)
        if not match:
            self.client.log_artifact(identifier, str(file))
            return
        from PIL import Image

        identity = uuid.uuid5(uuid.NAMESPACE_URL, file.name)
        name = f"preview+step+{int(match[1])}+timestamp+{milliseconds(moment)}+{identity}"
        with tempfile.TemporaryDirectory() as folder, Image.open(file) as picture:
            full, thumbnail = Path(folder) / f"{name}.png", Path(folder) / f"{name}+compressed.webp"
            picture.save(full)
            picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
            picture.save(thumbnail)
            for image in (full, thumbnail):
                self.client.log_artifact(identifier, str(image), "images")
        self.client.set_tag(identifier, "mlflow.loggedImages", "True")


def milliseconds(moment: float) -> int:
    """Return a time in seconds as MLflow takes it."""
    return int(moment * 1000)


def describe_error(error: Exception) -> str:
    """Return an error as one short line; of errors whose text alone says little, also the type."""
    message = " ".join(str(error).split())[:300]
    return message if type(error).__module__.startswith("mlflow") else f"{type(error).__name__}: {message}"


def is_refusal(error: Exception) -> bool:
    """Return whether an artifact store refuses a file for good, rather than being unable to take it now."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and hasattr(error, "get_http_status_code"):
        status = error.get_http_status_code()
    match = REFUSAL.search(str(error))
    return status in REFUSED_STATUSES or match is not None


def read_state(run: Path) -> dict[str, Any]:
    """Return the saved synchronization state of a run. Raises FileNotFoundError if it was never synchronized."""
    state = records.read(run / STATE, SyncState)
    return {**state, "artifacts": state.get("artifacts", [])}  # an earlier version sent files with the metrics


def save(run: Path, state: dict[str, Any]) -> None:
    write_atomically(run / STATE, json.dumps(state))


def run_id(run: str | Path) -> str | None:
    """Return the MLflow id of a run; None if it was never synchronized."""
    try:
        return read_state(Path(run))["run_id"]
    except FileNotFoundError:
        return None
