"""The sbatch script of a submission: its parameters, its environment, and the errors of sbatch."""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from submitit.core.utils import FailedJobError, FailedSubmissionError

from slurm import commands
from slurm.profile import Profile, for_kind

JOB_VARIABLES = ("SLURM_", "SBATCH_", "SRUN_", "MASTER_ADDR", "MASTER_PORT")  # prefixes
CLUSTER_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
Value = TypeVar("Value")
START = re.compile(r"Job [0-9]+ to start at (\S+) using .* nodes (\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Size of a submission: the `elements` of an array job, or the nodes and ranks of a multi-rank job."""

    kind: str
    elements: tuple[int, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    per_task: int = 1  # elements that one task of an array processes, one after the other

    @property
    def tasks(self) -> list[tuple[int, ...]]:
        """The elements of each task of an array; empty for a multi-rank job."""
        return [self.elements[begin : begin + self.per_task] for begin in range(0, len(self.elements), self.per_task)]


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
        "array_parallelism": profile.array_parallelism or len(shape.tasks) or 1,
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
        for text in texts_of(value) if key != "setup" else (*profile.modules, *texts_of(profile.environment)):
            check_line(key, text)
    return present


def texts_of(value: Any) -> list[str]:
    """Return the single texts of a parameter, which may be a list or a table of them."""
    if value is None:
        return []
    items = (
        [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
    )
    return [str(item) for item in items]


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
        raise commands.error_of(f"sbatch: {(text[2] or text[0]).strip()}") from error


def submitted_once(folder: Path, submit: Callable[[], Value]) -> Value:
    """Call `submit`, which runs sbatch for a script in `folder`, again while the controller does not answer.

    A controller may accept a job without the answer reaching sbatch. Such a job is cancelled before the next attempt;
    it has no task to run, since submitit stores the task under the id of the job. Raises SlurmError if sbatch refuses,
    SlurmUnavailableError if there is no answer for a long time.
    """

    def attempt() -> Value:
        if orphans := commands.submitted_from(folder) - recorded(folder) if unanswered else set():
            commands.cancel("slurm", sorted(orphans))
        try:
            with refusals(), outside_of_a_job():
                return submit()
        except commands.SlurmUnavailableError:
            unanswered.append(time.monotonic())
            raise

    unanswered: list[float] = []
    return commands.patiently(attempt)


def predicted_start(text: str) -> str:
    """Return what `sbatch --test-only` says about a script: when and where its job would start.

    Raises SlurmUnavailableError if Slurm does not answer, SlurmError if it would refuse the job.
    """
    with outside_of_a_job():
        try:
            done = subprocess.run(
                ["sbatch", "--test-only"], input=text, capture_output=True, text=True, errors="replace"
            )
        except FileNotFoundError:
            raise commands.SlurmError("sbatch: no such command; this machine has no Slurm") from None
    lines = [line.removeprefix("sbatch: ") for line in done.stderr.splitlines()]
    if done.returncode:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error:")]
        reason = next((line for line in (*lines[::-1], *errors) if line.startswith("allocation failure")), "")
        raise commands.error_of(f"sbatch: {reason or (errors or lines or ['refused'])[0]}")
    starts = [match for line in lines if (match := START.search(line))]
    return f"would start at {starts[-1][1]} on {starts[-1][2]}" if starts else "accepted, without a predicted start"


def recorded(folder: Path) -> set[str]:
    """Return the ids of the jobs for which submitit has recorded that they were submitted from a folder."""
    return {path.name.partition("_")[0] for path in folder.glob("*_submission.sh")}


def check_line(name: str, value: str) -> None:
    """Check that a value has no control character. Raises ValueError, naming `name`, if it has one."""
    if not value.isprintable():
        raise ValueError(f"{name} {value!r}: an sbatch script cannot contain control characters; remove them")
