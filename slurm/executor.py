"""Submits callables to a cluster as its profile says: arrays of tasks, or one job of several ranks."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.slurm.slurm import _make_sbatch_string

from slurm import commands
from slurm.profile import Profile
from slurm.task import Task

CODE = Path(__file__).parents[1]
# That a thread of OpenMP waits for the others before it sleeps. By its default, training on processors that others use
# too takes half as long again; where nobody else is, as long.
SPINS = "1000"
LOCAL_MINUTES = 7 * 24 * 60  # submitit's local executor kills a job after 5 minutes unless told otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What a submission asks for; `elements` of an array, else nodes and ranks."""

    kind: str
    elements: tuple[int, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """A job of submitit's and the array elements that are its own."""

    job: submitit.Job
    elements: tuple[int, ...]


class Cluster:
    """Submits for the run in folder `run`, whose `logs` receive submitit's pickles and what the tasks print.

    Tasks import the suite from `code`. Jobs wait until those of `after` have succeeded.
    """

    def __init__(self, profile: Profile, run: Path, *, code: Path | None = None, after: Sequence[str] = ()) -> None:
        self.profile, self.run, self.code, self.after = profile, run, code, after
        self.folder = run / "logs"

    @property
    def is_slurm(self) -> bool:
        return self.profile.executor == "slurm"

    def array_shape(self, kind: str, elements: Sequence[int]) -> Shape:
        return Shape(kind=kind, elements=tuple(elements), gpus_per_node=min(1, self.profile.gpus_per_node))

    def ranks_shape(self, kind: str, nodes: int, ranks_per_node: int | None) -> Shape:
        """One rank for each GPU; one a node where there are none."""
        ranks = ranks_per_node or max(1, self.profile.gpus_per_node)
        gpus = ranks if self.profile.gpus_per_node else 0
        return Shape(kind=kind, nodes=nodes, ranks_per_node=ranks, gpus_per_node=gpus)

    def check(self, shape: Shape) -> None:
        """Raises ValueError for what this cluster would never run."""
        if not self.is_slurm:
            return
        profile, allowed = self.profile, commands.partition(self.profile.partition)
        name = profile.partition or "the default partition"
        minutes = profile.minutes.get(shape.kind)
        if minutes and allowed.minutes and minutes > allowed.minutes:
            raise ValueError(f"{shape.kind}: {minutes} minutes, but {name} allows {allowed.minutes}")
        if shape.gpus_per_node > allowed.gpus_per_node:
            raise ValueError(
                f"{shape.kind}: {shape.gpus_per_node} GPUs a node, but the nodes of {name} have {allowed.gpus_per_node}"
            )
        if shape.nodes > allowed.nodes:
            raise ValueError(f"{shape.kind}: {shape.nodes} nodes, but {name} has {allowed.nodes}")

    def sbatch_text(self, shape: Shape) -> str:
        """Just what sbatch is given; of an array that is split, its first part."""
        check_line("run folder", str(self.run))
        parameters = slurm_parameters(self.profile, shape, code=self.code, after=self.after)
        python = self.profile.python.get(shape.kind) or shlex.quote(sys.executable)
        command = f"{python} -u -m submitit.core._submit {shlex.quote(str(self.folder))}"
        count = len(shape.elements) if len(shape.elements) > 1 else None
        return _make_sbatch_string(command=command, folder=self.folder, **parameters, map_count=count)

    def describe(self, shape: Shape) -> str:
        """What a submission of this shape would be."""
        if self.is_slurm:
            return self.sbatch_text(shape)
        if shape.elements:
            return f"{shape.kind}: {len(shape.elements)} shards in {self.lanes(shape)} processes on this machine"
        return f"{shape.kind}: {shape.nodes * shape.ranks_per_node} ranks on this machine"

    def lanes(self, shape: Shape) -> int:
        """Processes on this machine; each has a GPU of its own where there are any."""
        most = self.profile.array_parallelism or os.cpu_count() or 1
        return min(most, self.profile.gpus_per_node or most, len(shape.elements))

    def submit_array(self, shape: Shape, function: Callable[[list[int]], Any]) -> list[Submitted]:
        """One task per element on Slurm; on this machine, as many processes as may run at once share the elements.

        An array beyond Slurm's largest is submitted in parts, one after the other where so many may run at once.
        """
        elements, task = shape.elements, Task(function=function, run=str(self.run))
        if not self.is_slurm:
            shares = [elements[lane :: self.lanes(shape)] for lane in range(self.lanes(shape))]
            gpus = range(self.profile.gpus_per_node)
            with environment(self.local_environment(processes=len(shares))):
                return [
                    Submitted(job=self.local_executor(shape, gpus[lane:][:1]).submit(task, list(share)), elements=share)
                    for lane, share in enumerate(shares)
                ]
        largest, submitted = commands.max_array_size(), list[Submitted]()
        for begin in range(0, len(elements), largest):
            part = elements[begin : begin + largest]
            before = submitted[-1].job.job_id.partition("_")[0] if submitted and self.profile.array_parallelism else ""
            jobs = self.slurm_executor(shape, before).map_array(task, [[element] for element in part])
            submitted += [Submitted(job=job, elements=(element,)) for job, element in zip(jobs, part, strict=True)]
        return submitted

    def submit_ranks(self, shape: Shape, function: Callable[[], Any], *, cooperative: bool = False) -> Submitted:
        """One job of `nodes * ranks_per_node` ranks; on this machine, that many processes."""
        task = Task(function=function, run=str(self.run), ranks=True, cooperative=cooperative)
        if self.is_slurm:
            return Submitted(job=self.slurm_executor(shape).submit(task), elements=())
        with environment(self.local_environment(processes=shape.nodes * shape.ranks_per_node)):
            gpus = range(self.profile.gpus_per_node)
            return Submitted(job=self.local_executor(shape, gpus).submit(task), elements=())

    def slurm_executor(self, shape: Shape, before: str = "") -> submitit.SlurmExecutor:
        """The jobs begin when `before` has ended, in whatever way."""
        executor = submitit.SlurmExecutor(folder=self.folder, python=self.profile.python.get(shape.kind))
        parameters = slurm_parameters(self.profile, shape, code=self.code, after=self.after)
        if before:
            parameters["dependency"] = ",".join(filter(None, [parameters.get("dependency"), f"afterany:{before}"]))
        executor.update_parameters(**parameters)
        return executor

    def local_executor(self, shape: Shape, gpus: Sequence[int]) -> submitit.LocalExecutor:
        executor = submitit.LocalExecutor(folder=self.folder, python=self.profile.python.get(shape.kind))
        executor.update_parameters(
            timeout_min=LOCAL_MINUTES,
            nodes=1,
            tasks_per_node=shape.nodes * shape.ranks_per_node,
            gpus_per_node=len(gpus),  # submitit hides the others
            visible_gpus=gpus,
        )
        return executor

    def local_environment(self, processes: int) -> dict[str, str]:
        """What is set already stays as it is; another Python finds this very code, as a job on Slurm does."""
        threads = max(1, (os.cpu_count() or 1) // processes)
        wanted = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": SPINS, **self.profile.environment}
        path = os.pathsep.join(filter(None, [str(CODE), os.environ.get("PYTHONPATH")]))
        return {**{name: value for name, value in wanted.items() if name not in os.environ}, "PYTHONPATH": path}


def slurm_parameters(
    profile: Profile, shape: Shape, *, code: Path | None = None, after: Sequence[str] = ()
) -> dict[str, Any]:
    """A profile and a shape in the words of submitit's SlurmExecutor; a pure function.

    Raises ValueError for a value with a line break, which no quoting keeps within its line.
    """
    gpu = f"gpu:{profile.gpu_type}" if profile.gpu_type else "gpu"
    additional = {
        "chdir": code and str(code),
        "requeue" if profile.requeue else "no-requeue": True,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    # Slurm 22.05 to 23.02 does not hand cpus-per-task on to srun.
    srun = [f"--cpus-per-task={profile.cpus_per_task}", "--kill-on-bad-exit=1", *profile.srun_args]
    if profile.container:
        srun.append(f"--container-image={profile.container}")
    if profile.container_mounts:
        srun.append(f"--container-mounts={','.join(profile.container_mounts)}")
    parameters = {
        "job_name": f"pixart-{shape.kind}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.ranks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "gres": f"{gpu}:{shape.gpus_per_node}" if shape.gpus_per_node else None,
        "mem": f"{profile.memory_gb}GB" if profile.memory_gb else None,
        "time": profile.minutes.get(shape.kind),
        "signal_delay_s": profile.signal_seconds,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "array_parallelism": profile.array_parallelism or len(shape.elements) or 1,
        "srun_args": srun,
        "setup": [
            *(f"module load {shlex.quote(name)}" for name in profile.modules),
            *profile.setup,
            *(f"export {key}={shlex.quote(value)}" for key, value in profile.environment.items()),
        ],
        "additional_parameters": {key: value for key, value in additional.items() if value},
    }
    found = {key: value for key, value in parameters.items() if value is not None}
    for key, value in found.items():
        if key != "setup":
            check_line(key, str(value))
    return found


def check_line(what: str, value: str) -> None:
    if not value.isprintable():
        raise ValueError(f"{what} {value!r}: Slurm's scripts cannot hold a line break or another control character")


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables that a process started within inherits."""
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
