"""Run folders: the record of a run, its jobs, and the state of its elements."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jobs.state import completed, ledger
from jobs.state.journal import read_tail
from pixart import records
from pixart.atomic import write_atomically
from pixart.config.dataset import is_url
from pixart.records import Count, Nodes, Ranks
from pixart.relocation import FILE as LOCATIONS
from pixart.relocation import home_of, portable, present, record_location
from slurm import commands
from slurm.executor import Submitted
from slurm.task import RESULT

RECORD = "run.json"
METADATA = "tracking.json"  # of `run_metadata`, which is above this module
URL_LETTERS = "?%#"  # special characters in the URL of MLflow's embedded store
ACTIVE = ("pending", "running", "unknown")  # states of an element that may still change
UNFINISHED = ("failed", "cancelled")  # states of an element that `retry` submits again
MAX_LISTED = 5  # runs that an error message lists
TAIL_BYTES = 16_384  # end of a log that is searched for its last line


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """The record of a run. `jobs` are in the order of submission; the last job of an element replaces earlier ones."""

    folder: Path
    kind: str
    executor: str
    dataset: str
    total: Count  # number of elements of an array, or of steps of a training run
    nodes: Nodes = 0  # 0 for an array
    ranks_per_node: Ranks = 1
    elements: tuple[Count, ...] = ()
    per_task: Count = 1  # elements that one task of an array processes on Slurm
    request: dict[str, Any] = field(default_factory=dict)  # arguments of the job's function
    jobs: tuple[tuple[str, tuple[Count, ...]], ...] = ()  # job id, elements of the job
    after: tuple[str, ...] = ()  # ids of the jobs whose success it waited for

    @property
    def home(self) -> Path:
        """The home folder of a run in HOME/runs."""
        return self.folder.parent.parent  # of a folder directly below "/" it is "/"

    @property
    def ranks(self) -> int:
        """Number of ranks; 0 for an array."""
        return self.nodes * self.ranks_per_node

    def save(self) -> None:
        record = {key: value for key, value in asdict(self).items() if key != "folder"}
        write_atomically(self.folder / RECORD, json.dumps(portable(record, home_of(self.folder))) + "\n")

    def added(self, submitted: Sequence[Submitted]) -> "Run":
        """Return the run with further jobs, after saving it."""
        jobs = tuple((item.job.job_id, item.elements) for item in submitted)
        run = replace(self, jobs=(*self.jobs, *jobs))
        run.save()
        return run

    @property
    def writable(self) -> bool:
        """Whether this user may write to the folder; another user's run can only be read."""
        return os.access(self.folder, os.W_OK)

    @property
    def job_ids(self) -> list[str]:
        """Slurm job ids as scancel and --dependency accept them: one id per array."""
        return sorted({job.partition("_")[0] for job, _ in self.jobs})

    def job_of(self) -> dict[int, str]:
        """Return the newest job of each element; a job of ranks is one element, 0."""
        return {element: job for job, elements in self.jobs for element in elements or (0,)}

    def log(self, job: str, rank: int = 0, stream: str = "err") -> Path:
        """Return the path of a rank's log; `stream` is "out" or "err"."""
        return self.folder / "logs" / f"{job}_{rank}_log.{stream}"

    def logs(self, job: str, stream: str) -> list[Path]:
        """Return the existing logs of the job's ranks, in the order of the ranks."""
        return [log for rank in range(max(1, self.ranks)) if (log := self.log(job, rank, stream)).exists()]


def home(named: str | None) -> Path:
    """Return the home folder, which holds datasets, runs and tracking data.

    The default is PIXART_HOME, else `outputs`. Raises ValueError for a URL, or for a name with one of `?%#`.
    """
    name = named or os.environ.get("PIXART_HOME") or "outputs"
    if is_url(name) or any(letter in name for letter in URL_LETTERS):
        raise ValueError(
            f"--home {name}: must be a folder of a file system, without {' '.join(URL_LETTERS)} in its name"
        )
    folder = Path(name).absolute()
    if (folder / "runs").is_dir() and os.access(folder, os.W_OK):
        is_recorded = (folder / LOCATIONS).exists()
        earlier = [] if is_recorded else earlier_locations(folder)
        if is_recorded or earlier not in ([], [folder]):  # nothing is written into a home that has not moved
            record_location(folder, earlier)
    return folder


def earlier_locations(home: Path) -> list[Path]:
    """Return where a home without a file of its locations has been, by the absolute paths in its runs' records."""
    parents = []
    for path in (home / "runs").glob(f"*/{METADATA}"):
        with suppress(ValueError):  # a damaged record is reported where it is used
            parents.append(records.read(path, dict[str, Any]).get("parent"))
    return list(
        dict.fromkeys(
            Path(parent).parents[1] for parent in parents if isinstance(parent, str) and Path(parent).is_absolute()
        )
    )


def load(folder: Path) -> Run:
    """Load the record of a run. Raises ValueError if the folder is not a run folder, or the record is damaged."""
    try:
        content = records.read(folder / RECORD, dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{folder}: no run folder; name a folder in HOME/runs") from None
    content = present(content, home_of(folder))
    return records.convert({**content, "folder": folder}, Run, str(folder / RECORD))


def folders(home: Path) -> list[Path]:
    """Return the folders of all runs, oldest first."""
    return sorted(path.parent for path in (home / "runs").glob(f"*/{RECORD}"))


def find(home: Path, name: str | None) -> Run:
    """Return a run by its folder, its name or a unique part of its name; the newest run if `name` is None.

    Raises ValueError if no run or more than one matches.
    """
    if name and (Path(name) / RECORD).is_file():
        return load(Path(name).absolute())
    known = folders(home)
    if not known:
        raise ValueError(f"--home {home}: has no runs; run a job such as 'caption' first")
    if name is None:
        return load(known[-1])
    matches = [folder for folder in known if name in folder.name]
    exact = [folder for folder in matches if folder.name == name]
    if not matches:
        raise ValueError(f"run {name!r}: no runs in {home} match; give a part of exactly one name")
    if len(exact or matches) != 1:
        newest = [folder.name for folder in matches[: -MAX_LISTED - 1 : -1]]
        others = f" and {len(matches) - len(newest)} older ones" if len(matches) > len(newest) else ""
        raise ValueError(
            f"run {name!r}: {len(matches)} runs in {home} match, {', '.join(newest)}{others}; give a part of exactly "
            "one name"
        )
    return load((exact or matches)[0])


def run_folder(home: Path, name: str) -> str:
    """Return the folder of the run that a part of its name stands for; `name` itself if it is a path or no run matches.

    Raises ValueError if several runs match.
    """
    if Path(name).exists() or not any(name in folder.name for folder in folders(home)):
        return name
    return str(find(home, name).folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class Element:
    """State of an array element, or of a job of ranks.

    `state` is done, running, pending, cancelled, failed, or unknown if Slurm says a word that is not known; `note` is
    Slurm's reason or the last line of the error.
    """

    state: str
    job: str
    note: str = ""


def elements(run: Run) -> dict[int, Element]:
    """Return the state of each element: done if its data exists, else by the state of its job.

    Raises SlurmUnavailableError if Slurm does not answer.
    """
    return elements_of([run])[0]


def elements_of(runs: Sequence[Run]) -> list[dict[int, Element]]:
    """Return the state of each element of several runs, by one query of Slurm for all of them.

    Raises SlurmUnavailableError if Slurm does not answer.
    """
    states: dict[str, commands.JobState] = {}
    for executor in {run.executor for run in runs}:
        unfinished = [job for run in runs if run.executor == executor for job in unfinished_jobs(run)]
        states |= commands.states(executor, unfinished)
    return [elements_by_state(run, states) for run in runs]


def unfinished_jobs(run: Run) -> list[str]:
    """Return the newest jobs of the elements that are not done."""
    finished = done(run)
    return [job for element, job in run.job_of().items() if element not in finished]


def elements_by_state(run: Run, states: Mapping[str, commands.JobState]) -> dict[int, Element]:
    """Return the state of each element, given the states of the jobs that Slurm knows."""
    job_of = run.job_of()
    finished = done(run)  # after the query: an element that finished before Slurm answered has not failed
    waiting = {job: states[job] for element, job in job_of.items() if element not in finished and job in states}
    invisible = completed.recent(run.folder, waiting)
    never = Element(state="failed", job="", note="was not submitted")  # Slurm refused a later part of the array
    state_of = {}
    for element in sorted({*job_of, *run.elements}):
        job = job_of.get(element, "")
        if element in finished:
            state_of[element] = Element(state="done", job=job)
        elif job in invisible:
            state_of[element] = Element(state="running", job=job, note="completed; its result is not visible yet")
        else:
            state_of[element] = unfinished_element(run, job, states.get(job)) if job else never
    return state_of


def is_active(elements: dict[int, Element]) -> bool:
    """Return whether any element is pending or running, or may be."""
    return any(element.state in ACTIVE for element in elements.values())


def unfinished_element(run: Run, job: str, state: commands.JobState | None) -> Element:
    """Return the state of an element without data from the state of its job, if Slurm knows the job."""
    if state is not None and state.pending:
        return Element(state="pending", job=job, note=state.reason)
    if state is not None and state.running:
        return Element(state="running", job=job)
    if state is not None and not state.ended:
        return Element(state="unknown", job=job, note=f"Slurm says {state.state}")
    if state is not None and state.state == "CANCELLED":
        return Element(state="cancelled", job=job, note=state.reason)
    ended = f"{state.state.lower()}: " if state and state.state not in ("FAILED", "COMPLETED") else ""
    return Element(state="failed", job=job, note=ended + last_error(run, job))


def done(run: Run) -> set[int]:
    """Return the finished elements: the shards in the dataset's ledger, or 0 if the result of a job of ranks exists."""
    if run.ranks:
        return {0} if (run.folder / RESULT).exists() else set()
    return ledger.shards(run.dataset, ledger.entries_of(run.kind))


def result(run: Run) -> Any:
    """Return the result of rank 0. Raises FileNotFoundError without one, ValueError for a damaged one."""
    return records.read(run.folder / RESULT, Any)


def last_error(run: Run, job: str) -> str:
    """Return the last line of the first nonempty error log of the job's ranks, without Slurm's own messages."""
    for log in run.logs(job, "err"):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        nonempty = [line for line in lines if line]
        of_task = [line for line in nonempty if not line.startswith(("submitit ", "srun:", "slurmstepd"))]
        if nonempty:
            return (of_task or nonempty)[-1]
    return f"no error message in {run.log(job)}"


def seconds_per_step(run: Run) -> float | None:
    """Return the most recent seconds per step of training; None if none were logged."""
    metrics = [line["metrics"] for line in read_tail(run.folder) if "train/seconds_per_step" in line.get("metrics", {})]
    return metrics[-1]["train/seconds_per_step"] if metrics else None


def progress(run: Run) -> tuple[int, str]:
    """Return the number of finished steps and a note with the last loss, from the journal.

    Journal lines with only a step also count.
    """
    step, note = 0, ""
    for line in read_tail(run.folder):
        if "train/loss" in line.get("metrics", {}):
            step = max(step, line["step"])
            note = f"loss {line['metrics']['train/loss']:.4f}"
        elif line.keys() == {"time", "step"}:
            step = max(step, line["step"])
    return step, note
