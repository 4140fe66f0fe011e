"""The environment of a user who has not set any variable of the suite."""

import os
import shutil


def bare_environment() -> dict[str, str]:
    """Return the environment variables of this process without those of the suite and of MLflow.

    Where Slurm is installed, as by the tests of the cluster, PIXART_CLUSTER=local makes jobs run on this machine.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PIXART_", "MLFLOW_"))}
    return {**variables, "PIXART_CLUSTER": "local"} if shutil.which("sbatch") else variables
