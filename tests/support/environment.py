"""The shell of a user who has set nothing of the suite's."""

import os
import shutil


def bare_environment() -> dict[str, str]:
    """The variables of this process but for the suite's and MLflow's.

    Where Slurm's programs are installed, as the tests of the cluster do, one says that jobs run on this machine.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PIXART_", "MLFLOW_"))}
    return {**variables, "PIXART_CLUSTER": "local"} if shutil.which("sbatch") else variables
