"""The choice of MLflow's store, and the embedded SQLite file of a home folder, which moves with the home."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

EXPERIMENT = "pixart"
EMBEDDED = "sqlite:///{home}/mlflow.db"  # the embedded store in a saved state
ARTIFACTS = "mlartifacts"
ARTIFACT_COLUMNS = (  # of MLflow's database
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def store_uri(home: Path) -> str:
    """Return MLFLOW_TRACKING_URI, else the URI of the sqlite file in the home folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"


def same_store(recorded: str, uri: str) -> bool:
    """Return whether the store of a saved state is that of a tracker: its server, or the embedded one of the home.

    States of version 0.1 hold the path at which the embedded store was then.
    """
    embedded = recorded.startswith("sqlite:") and recorded.endswith("/mlflow.db")
    return embedded if not os.environ.get("MLFLOW_TRACKING_URI") else recorded == uri


def move_artifacts(home: Path) -> None:
    """Set the locations of artifacts in the embedded store of a home that has moved, which MLflow holds absolute."""
    database = home / "mlflow.db"
    if not database.exists():
        return
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if "experiments" not in tables:
            return
        query = "SELECT artifact_location FROM experiments WHERE name = ?"
        location, recorded = (home / ARTIFACTS).as_uri(), connection.execute(query, (EXPERIMENT,)).fetchone()
        if recorded is None or recorded[0] == location:
            return
        for table, column in ARTIFACT_COLUMNS:
            if table in tables:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (location, len(recorded[0]) + 1, len(recorded[0]), recorded[0]),
                )
