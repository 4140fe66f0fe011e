"""Submission of callables to the cluster of a profile, as an array job or as a multi-rank job."""

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from slurm import commands
from slurm.profile import Profile, for_kind
from slurm.task import Task

CODE_ROOT = Path(__file__).parents[1]
# GOMP_SPINCOUNT: iterations that an OpenMP thread spins at a barrier before it sleeps. With GNU OpenMP's default,
# training on processors that other jobs share takes 1.5 times as long; on idle processors there is no difference.
OPENMP_SPIN_COUNT = "1000"
JOB_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "MASTER_ADDR", "MASTER_PORT")  # prefixes
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
LOCAL_MINUTES = 7 * 24 * 60  # submitit's local executor kills a job after 5 minutes by default


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Size of a submission: the `elements` of an array job, or the nodes and ranks of a multi-rank job."""

    kind: str
    elements: tuple[int, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0


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

    def array_shape(self, kind: str, elements: Sequence[int]) -> Shape:
        """Return the shape of an array job, with one GPU per element if this kind of job has GPUs."""
        gpus = for_kind(self.profile, kind).gpus_per_node
        return Shape(kind=kind, elements=tuple(elements), gpus_per_node=min(1, gpus))

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
        allowed = commands.partition(profile.partition)
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
        count = len(shape.elements) if len(shape.elements) > 1 else None
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
        """Submit one task per element on Slurm; on this machine, `num_processes` processes that share the elements.

        Yields the jobs of each part as soon as it is accepted; raises SlurmError if Slurm refuses one.

        An array beyond Slurm's MaxArraySize is submitted in parts. If the profile limits how many elements run at once,
        each part waits for the end of the part before.
        """
        elements, task = shape.elements, Task(function=function, run=str(self.run))
        if not self.is_slurm:
            shares = [elements[index :: self.num_processes(shape)] for index in range(self.num_processes(shape))]
            gpus = range(self.profile.gpus_per_node)
            with environment(self.local_environment(processes=len(shares))):
                processes = [
                    Submitted(
                        job=self.local_executor(shape, gpus[index:][:1]).submit(task, list(share)), elements=share
                    )
                    for index, share in enumerate(shares)
                ]
            yield processes
            return
        largest, previous_job = commands.max_array_size(), ""
        for begin in range(0, len(elements), largest):
            part = elements[begin : begin + largest]
            with refusals(), outside_of_a_job():
                jobs = self.slurm_executor(shape, previous_job).map_array(task, [[element] for element in part])
            yield [Submitted(job=job, elements=(element,)) for job, element in zip(jobs, part, strict=True)]
            previous_job = jobs[-1].job_id.partition("_")[0] if self.profile.array_parallelism else ""

    def submit_ranks(self, shape: Shape, function: Callable[[], Any], *, cooperative: bool = False) -> Submitted:
        """Submit one job of `nodes * ranks_per_node` ranks; the local executor starts as many processes.

        `cooperative` is explained in `Task`.
        """
        task = Task(function=function, run=str(self.run), ranks=True, cooperative=cooperative)
        if self.is_slurm:
            with refusals(), outside_of_a_job():
                return Submitted(job=self.slurm_executor(shape).submit(task), elements=())
        with environment(self.local_environment(processes=shape.nodes * shape.ranks_per_node)):
            gpus = range(self.profile.gpus_per_node)
            return Submitted(job=self.local_executor(shape, gpus).submit(task), elements=())

    def slurm_executor(self, shape: Shape, previous_job: str = "") -> submitit.SlurmExecutor:
        """Return submitit's executor for a shape; its jobs start after job `before` has ended, failed or not."""
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


def slurm_parameters(
    profile: Profile, shape: Shape, *, code: Path | None = None, after: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the parameters of submitit's SlurmExecutor for a profile and a shape.

    Raises ValueError for a value with a control character: a line break cannot be quoted in an sbatch script.
    """
    profile = for_kind(profile, shape.kind)
    gpu = f"gpu:{profile.gpu_type}" if profile.gpu_type else "gpu"
    additional = {
        "chdir": code and str(code),
        "reservation": profile.reservation,
        "requeue" if profile.requeue else "no-requeue": True,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    # In Slurm 22.05 to 23.02, srun does not inherit --cpus-per-task from sbatch.
    cpus = f"--cpus-per-task={profile.cpus_per_task}"
    srun = [cpus, "--export=ALL", "--kill-on-bad-exit=1", *profile.srun_args]
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
    present: dict[str, Any] = {key: value for key, value in parameters.items() if value is not None}
    present["wckey"] = profile.wckey  # None: no key at all, in place of submitit's
    for key, value in present.items():
        if key != "setup" and value is not None:
            check_line(key, str(value))
    return present


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Remove the variables of the job that this process runs in, which sbatch would take for options of the new job."""
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    before = dict(os.environ)
    for name in before:
        if name.startswith(JOB_VARIABLES) and name not in CLUSTER_VARIABLES:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def refusals() -> Iterator[None]:
    """Raise SlurmError, with the last line that sbatch wrote, in place of submitit's errors of a submission."""
    try:
        yield
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        lines = [line for line in str(error).splitlines() if "sbatch: error:" in line] or str(error).splitlines()
        text = (lines or [type(error).__name__])[0].partition("sbatch: error:")
        raise commands.SlurmError(f"sbatch: {(text[2] or text[0]).strip()}") from error


def check_line(name: str, value: str) -> None:
    """Check that a value has no control character. Raises ValueError, naming `name`, if it has one."""
    if not value.isprintable():
        raise ValueError(f"{name} {value!r}: an sbatch script cannot contain control characters; remove them")


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
