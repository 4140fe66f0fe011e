"""Run folders: what each submission was, which jobs it has, and how each of its elements stands."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.state import ledger
from jobs.state.journal import read_tail
from jobs.state.json_record import of_this_version, read_record
from pixart.config.dataset import is_url
from slurm import commands
from slurm.executor import Submitted
from slurm.task import RESULT

RECORD = "run.json"
URL_LETTERS = "?%#"  # which mean something else in the URL of MLflow's embedded store
TAIL_BYTES = 16_384  # of a log, in which its last line is looked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A submission. `jobs` are in the order of submission: of two that share an element, the later one counts."""

    folder: Path
    kind: str
    executor: str
    dataset: str
    total: int  # elements of an array, steps of a training run
    nodes: int = 0  # 0 for an array
    ranks_per_node: int = 1
    elements: tuple[int, ...] = ()
    request: dict[str, Any] = field(default_factory=dict)  # arguments of its function
    jobs: tuple[tuple[str, tuple[int, ...]], ...] = ()  # job id, its elements

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def save(self) -> None:
        record = {key: value for key, value in asdict(self).items() if key != "folder"}
        ledger.write_atomically(self.folder / RECORD, json.dumps(record) + "\n")

    def added(self, submitted: Sequence[Submitted]) -> "Run":
        """The run with jobs more, saved."""
        jobs = tuple((item.job.job_id, item.elements) for item in submitted)
        run = replace(self, jobs=(*self.jobs, *jobs))
        run.save()
        return run

    @property
    def writable(self) -> bool:
        """Not so that of somebody else, which is just looked at."""
        return os.access(self.folder, os.W_OK)

    @property
    def job_ids(self) -> list[str]:
        """As scancel and a dependency take them: an array by its own id."""
        return sorted({job.partition("_")[0] for job, _ in self.jobs})

    def job_of(self) -> dict[int, str]:
        """The newest job of each element; a run of ranks is one element, 0."""
        return {element: job for job, elements in self.jobs for element in elements or (0,)}

    def log(self, job: str, rank: int = 0, stream: str = "err") -> Path:
        return self.folder / "logs" / f"{job}_{rank}_log.{stream}"

    def logs(self, job: str, stream: str) -> list[Path]:
        """Of all the job's ranks, those that are there."""
        return [log for rank in range(max(1, self.ranks)) if (log := self.log(job, rank, stream)).exists()]


def home(named: str | None) -> Path:
    """The folder of datasets, runs and tracking. Raises ValueError for a name that it cannot have."""
    name = named or os.environ.get("PIXART_HOME") or "outputs"
    if is_url(name) or any(letter in name for letter in URL_LETTERS):
        raise ValueError(f"home {name}: must be a folder of a file system, without {' '.join(URL_LETTERS)} in its name")
    return Path(name).absolute()


def load(folder: Path) -> Run:
    """Raises ValueError for a folder that is no run's."""
    try:
        record = read_record(folder / RECORD, "kind", "executor", "dataset", "total", "elements", "jobs")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder} is no run folder") from None
    jobs = tuple((job, tuple(elements)) for job, elements in record.pop("jobs"))
    with of_this_version(folder / RECORD):
        return Run(**{**record, "folder": folder, "elements": tuple(record["elements"]), "jobs": jobs})


def folders(home: Path) -> list[Path]:
    """Of all runs, oldest first."""
    return sorted(path.parent for path in (home / "runs").glob(f"*/{RECORD}"))


def find(home: Path, name: str | None) -> Run:
    """A run by folder, by name or by a part of its name that no other has; the newest where no name is given.

    Raises ValueError where there is none, or more than one.
    """
    if name and (Path(name) / RECORD).is_file():
        return load(Path(name).absolute())
    known = folders(home)
    if not known:
        raise ValueError(f"there are no runs in {home}")
    if name is None:
        return load(known[-1])
    found = [folder for folder in known if name in folder.name]
    exact = [folder for folder in found if folder.name == name]
    if len(exact or found) != 1:
        raise ValueError(f"run {name!r}: {len(found) or 'no'} runs of {home} have this in their name")
    return load((exact or found)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """`state` is done, running, pending or failed; `note` is Slurm's reason or the last line of the error."""

    state: str
    job: str
    note: str = ""


def elements(run: Run) -> dict[int, Element]:
    """How each element stands: by the data first, by Slurm where it is not there. Raises SlurmError."""
    job_of, there = run.job_of(), done(run)
    states = commands.states(run.executor, [job for element, job in job_of.items() if element not in there])
    there = done(run)  # what was written until Slurm answered does not count as failed
    return {element: stand(run, job, element in there, states.get(job)) for element, job in sorted(job_of.items())}


def under_way(found: dict[int, Element]) -> bool:
    return any(element.state in ("pending", "running") for element in found.values())


def stand(run: Run, job: str, is_done: bool, state: commands.JobState | None) -> Element:
    if is_done:
        return Element(state="done", job=job)
    if state is not None and state.waiting:
        return Element(state="pending", job=job, note=state.reason)
    if state is not None and not state.over:
        return Element(state="running", job=job)
    ended = f"{state.state.lower()}: " if state and state.state not in ("FAILED", "COMPLETED") else ""
    return Element(state="failed", job=job, note=ended + last_error(run, job))


def done(run: Run) -> set[int]:
    """By the data's own ledger; of a run of ranks, 0 where its result is there."""
    if run.ranks:
        return {0} if (run.folder / RESULT).exists() else set()
    return ledger.shards(run.dataset, run.kind)


def result(run: Run) -> Any:
    """What rank 0 returned. Raises FileNotFoundError before."""
    return json.loads((run.folder / RESULT).read_text())


def last_error(run: Run, job: str) -> str:
    """The last line that says something in the log of the job's first rank that has one."""
    for log in run.logs(job, "err"):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        own = [line for line in lines if line and not line.startswith(("submitit ", "srun:", "slurmstepd"))]
        if told := own or [line for line in lines if line]:
            return told[-1]
    return f"no word in {run.log(job)}"


def seconds_per_step(run: Run) -> float | None:
    """As training has last told it; None before."""
    told = [line["metrics"] for line in read_tail(run.folder) if "train/seconds_per_step" in line.get("metrics", {})]
    return told[-1]["train/seconds_per_step"] if told else None


def progress(run: Run) -> tuple[int, str]:
    """Steps done and the last loss, from the journal; a line that has just a step is for this alone."""
    step, note = 0, ""
    for line in read_tail(run.folder):
        if "train/loss" in line.get("metrics", {}):
            step = max(step, line["step"])
            note = f"loss {line['metrics']['train/loss']:.4f}"
        elif line.keys() == {"time", "step"}:
            step = max(step, line["step"])
    return step, note
