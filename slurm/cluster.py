"""Submits callables to a cluster as its profile says: arrays of tasks, or one job of several ranks."""

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit

from slurm.profile import Profile

LOCAL_MINUTES = 7 * 24 * 60  # submitit's local executor kills a job after 5 minutes unless told otherwise


class Cluster:
    """`folder` receives submitit's pickles and the tasks' logs."""

    def __init__(self, profile: Profile, folder: Path) -> None:
        self.profile, self.folder = profile, folder

    @property
    def parallelism(self) -> int:
        return self.profile.array_parallelism or os.cpu_count() or 1

    def ranks_per_node(self) -> int:
        return max(1, self.profile.gpus_per_node)

    def submit_array(
        self, kind: str, function: Callable[[list[int]], Any], elements: Sequence[int]
    ) -> list[submitit.Job]:
        """One task per element on Slurm; on this machine, as many processes as may run at once share the elements."""
        if self.profile.executor == "slurm":
            executor = self.executor(kind, nodes=1, tasks_per_node=1, gpus=min(1, self.profile.gpus_per_node))
            return executor.map_array(function, [[element] for element in elements])
        lanes = min(self.parallelism, len(elements))
        executor = self.executor(kind, nodes=1, tasks_per_node=1, gpus=0)
        threads = max(1, (os.cpu_count() or 1) // lanes)
        with environment({**self.profile.environment, "OMP_NUM_THREADS": str(threads)}):
            return [executor.submit(function, list(elements[lane::lanes])) for lane in range(lanes)]

    def submit_ranks(
        self, kind: str, nodes: int, function: Callable[[], Any], ranks_per_node: int | None = None
    ) -> submitit.Job:
        """One job of as many ranks a node as it has GPUs (one without); on this machine, that many processes."""
        per_node = ranks_per_node or self.ranks_per_node()
        gpus = self.profile.gpus_per_node and per_node
        if self.profile.executor == "slurm":
            return self.executor(kind, nodes=nodes, tasks_per_node=per_node, gpus=gpus).submit(function)
        ranks = nodes * per_node
        threads = max(1, (os.cpu_count() or 1) // ranks)
        with environment({**self.profile.environment, "OMP_NUM_THREADS": str(threads)}):
            return self.executor(kind, nodes=1, tasks_per_node=ranks, gpus=0).submit(function)

    def executor(self, kind: str, *, nodes: int, tasks_per_node: int, gpus: int) -> submitit.Executor:
        profile = self.profile
        python = profile.python.get(kind)
        if profile.executor == "local":
            local = submitit.LocalExecutor(folder=self.folder, python=python)
            local.update_parameters(
                timeout_min=LOCAL_MINUTES,
                nodes=nodes,
                tasks_per_node=tasks_per_node,
                gpus_per_node=profile.gpus_per_node,  # submitit hides those that are not asked for
            )
            return local
        executor = submitit.SlurmExecutor(folder=self.folder, python=python)
        executor.update_parameters(**slurm_parameters(profile, kind, nodes, tasks_per_node, gpus, self.parallelism))
        return executor


def slurm_parameters(
    profile: Profile, kind: str, nodes: int, tasks_per_node: int, gpus: int, parallelism: int
) -> dict[str, Any]:
    """A profile in the words of submitit's SlurmExecutor; a pure function."""
    additional = {"mail_user": profile.mail_user, "mail_type": profile.mail_type}
    gres = f"gpu:{profile.gpu_type}:{gpus}" if profile.gpu_type else f"gpu:{gpus}"
    parameters = {
        "job_name": f"pixart-{kind}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "nodes": nodes,
        "ntasks_per_node": tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        # Slurm 22.05 to 23.02 does not hand cpus-per-task on to srun.
        "srun_args": [f"--cpus-per-task={profile.cpus_per_task}"],
        "gres": gres if gpus else None,
        "mem": f"{profile.memory_gb}GB" if profile.memory_gb else None,
        "time": profile.minutes.get(kind),
        "array_parallelism": parallelism,
        "setup": [
            *profile.setup,
            *(f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()),
        ],
        "additional_parameters": {key: value for key, value in additional.items() if value},
    }
    return {key: value for key, value in parameters.items() if value is not None}


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables that a process started within inherits; those that are set already stay as they are."""
    added = {key: value for key, value in values.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            del os.environ[key]
