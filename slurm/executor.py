"""Submission of callables to the cluster of a profile, as an array job or as a multi-rank job."""

import functools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from slurm import commands, limits
from slurm.profile import Profile, for_kind
from slurm.sbatch import Shape, check_line, slurm_parameters, submitted_once
from slurm.task import Task

CODE_ROOT = Path(__file__).parents[1]
# GOMP_SPINCOUNT: iterations that an OpenMP thread spins at a barrier before it sleeps. With GNU OpenMP's default,
# training on processors that other jobs share takes 1.5 times as long; on idle processors there is no difference.
OPENMP_SPIN_COUNT = "1000"
LOCAL_MINUTES = 7 * 24 * 60  # submitit's local executor kills a job after 5 minutes by default


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A submitit job and the array elements that it processes."""

    job: submitit.Job
    elements: tuple[int, ...]


class Cluster:
    """The cluster of a profile, for submissions of the run in folder `run`.

    The run's `logs` folder receives submitit's pickles and the output of the tasks. Tasks import the suite from `code`.
    Jobs wait until the jobs with the ids in `after` have succeeded.
    """

    def __init__(self, profile: Profile, run: Path, *, code: Path | None = None, after: Sequence[str] = ()) -> None:
        self.profile, self.run, self.code, self.after = profile, run, code, after
        self.folder = run / "logs"

    @property
    def is_slurm(self) -> bool:
        return self.profile.executor == "slurm"

    def array_shape(self, kind: str, elements: Sequence[int], per_task: int = 1) -> Shape:
        """Return the shape of an array job, with one GPU per task if this kind of job has GPUs."""
        gpus = for_kind(self.profile, kind).gpus_per_node
        return Shape(kind=kind, elements=tuple(elements), gpus_per_node=min(1, gpus), per_task=per_task)

    def ranks_shape(self, kind: str, nodes: int, ranks_per_node: int | None) -> Shape:
        """Return the shape of a multi-rank job (default: one rank per GPU, or one per node without GPUs)."""
        available = for_kind(self.profile, kind).gpus_per_node
        ranks = ranks_per_node or max(1, available)
        gpus = ranks if available else 0
        return Shape(kind=kind, nodes=nodes, ranks_per_node=ranks, gpus_per_node=gpus)

    def check(self, shape: Shape) -> None:
        """Check a shape against the limits of the Slurm partition.

        Raises ValueError if its time limit, GPUs per node or nodes exceed them; SlurmError if Slurm does not answer.
        """
        if not self.is_slurm:
            return
        profile = for_kind(self.profile, shape.kind)
        allowed = commands.patiently(functools.partial(limits.partition, profile.partition))
        name = profile.partition or "the default partition"
        minutes = profile.minutes.get(shape.kind)
        if minutes and allowed.minutes and minutes > allowed.minutes:
            raise ValueError(
                f"minutes.{shape.kind}={minutes}: more than {name} allows; it must be at most {allowed.minutes}"
            )
        if shape.gpus_per_node > allowed.gpus_per_node:
            raise ValueError(
                f"{shape.kind}: {shape.gpus_per_node} GPUs per node exceed those of {name}; request at most "
                f"{allowed.gpus_per_node}"
            )
        if shape.nodes > allowed.nodes:
            raise ValueError(
                f"{shape.kind}: {shape.nodes} nodes exceed those of {name}; request at most {allowed.nodes}"
            )

    def sbatch_text(self, shape: Shape) -> str:
        """Return the sbatch script as it is submitted; for an array that is submitted in parts, that of the first.

        Raises ValueError if the folder's name or a parameter has a control character.
        """
        check_line("run folder", str(self.run))
        parameters = slurm_parameters(self.profile, shape, code=self.code, after=self.after)
        python = self.profile.python.get(shape.kind) or shlex.quote(sys.executable)
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        count = len(shape.tasks) if len(shape.tasks) > 1 else None
        return _make_sbatch_string(command=command, folder=self.folder, **parameters, map_count=count)

    def describe(self, shape: Shape) -> str:
        """Return a description of a submission: the sbatch script, or one line for the local executor."""
        if self.is_slurm:
            return self.sbatch_text(shape)
        if shape.elements:
            return (
                f"{shape.kind}: {len(shape.elements)} shards in {self.num_processes(shape)} processes on this machine"
            )
        return f"{shape.kind}: {shape.nodes * shape.ranks_per_node} ranks on this machine"

    def num_processes(self, shape: Shape) -> int:
        """Return the number of local processes that share an array; with GPUs, at most one per GPU."""
        limit = self.profile.array_parallelism or os.cpu_count() or 1
        return min(limit, self.profile.gpus_per_node or limit, len(shape.elements))

    def submit_array(self, shape: Shape, function: Callable[[list[int]], Any]) -> Iterator[list[Submitted]]:
        """Submit the tasks of the shape on Slurm; on this machine, `num_processes` processes that share the elements.

        Yields the jobs of each part as soon as it is accepted; raises SlurmError if Slurm refuses one.

        An array beyond Slurm's MaxArraySize is submitted in parts. If the profile limits how many tasks run at once,
        each part waits for the end of the part before.
        """
        elements, task = shape.elements, Task(function=function, run=str(self.run))
        if not self.is_slurm:
            shares = [elements[index :: self.num_processes(shape)] for index in range(self.num_processes(shape))]
            gpus = range(self.profile.gpus_per_node)
            with environment(self.local_environment(processes=len(shares))), interrupts_blocked():
                processes = [
                    Submitted(
                        job=self.local_executor(shape, gpus[index:][:1]).submit(task, list(share)), elements=share
                    )
                    for index, share in enumerate(shares)
                ]
            yield processes
            return
        largest, previous_job = commands.patiently(limits.max_array_size), ""
        for begin in range(0, len(shape.tasks), largest):
            part = shape.tasks[begin : begin + largest]
            executor = self.slurm_executor(shape, previous_job)
            jobs = submitted_once(self.folder, functools.partial(executor.map_array, task, list(map(list, part))))
            yield [Submitted(job=job, elements=shards) for job, shards in zip(jobs, part, strict=True)]
            previous_job = jobs[-1].job_id.partition("_")[0] if self.profile.array_parallelism else ""

    def submit_ranks(self, shape: Shape, function: Callable[[], Any], *, cooperative: bool = False) -> Submitted:
        """Submit one job of `nodes * ranks_per_node` ranks; the local executor starts as many processes.

        `cooperative` is explained in `Task`.
        """
        task = Task(function=function, run=str(self.run), ranks=True, cooperative=cooperative)
        if self.is_slurm:
            executor = self.slurm_executor(shape)
            job = submitted_once(self.folder, functools.partial(executor.submit, task))
            return Submitted(job=job, elements=())
        with environment(self.local_environment(processes=shape.nodes * shape.ranks_per_node)), interrupts_blocked():
            gpus = range(self.profile.gpus_per_node)
            return Submitted(job=self.local_executor(shape, gpus).submit(task), elements=())

    def slurm_executor(self, shape: Shape, previous_job: str = "") -> submitit.SlurmExecutor:
        """Return submitit's executor for a shape; its jobs start after `previous_job` has ended, failed or not."""
        executor = submitit.SlurmExecutor(folder=self.folder, python=self.profile.python.get(shape.kind))
        parameters = slurm_parameters(self.profile, shape, code=self.code, after=self.after)
        if previous_job:
            parameters["dependency"] = ",".join(
                filter(None, [parameters.get("dependency"), f"afterany:{previous_job}"])
            )
        executor.update_parameters(**parameters)
        return executor

    def local_executor(self, shape: Shape, gpus: Sequence[int]) -> submitit.LocalExecutor:
        """Return submitit's executor for processes on this machine that see only the given GPUs."""
        executor = submitit.LocalExecutor(folder=self.folder, python=self.profile.python.get(shape.kind))
        executor.update_parameters(
            timeout_min=LOCAL_MINUTES,
            nodes=1,
            tasks_per_node=shape.nodes * shape.ranks_per_node,
            gpus_per_node=len(gpus),  # submitit hides the others by CUDA_VISIBLE_DEVICES
            visible_gpus=gpus,
        )
        return executor

    def local_environment(self, processes: int) -> dict[str, str]:
        """Return the environment variables of local processes, without those that are already set.

        PYTHONPATH makes a Python interpreter of the profile import this code, as a job on Slurm does.
        """
        threads = max(1, (os.cpu_count() or 1) // processes)
        wanted = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": OPENMP_SPIN_COUNT, **self.profile.environment}
        path = os.pathsep.join(filter(None, [str(CODE_ROOT), os.environ.get("PYTHONPATH")]))
        return {**{name: value for name, value in wanted.items() if name not in os.environ}, "PYTHONPATH": path}


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block SIGINT for the block, and for ever in processes started in it.

    A terminal sends Ctrl-C to all processes. Those of submitit's local executor would kill their tasks after a second;
    it is the launcher that ends them, by SIGTERM, which lets a task save its work.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the block, so that processes started in it inherit them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
