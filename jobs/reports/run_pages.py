"""HTML pages of a run folder: their generation, and the page that `open` shows."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conversion.report.text import PAGE as REPORT_PAGE
from jobs.progress import format_duration
from jobs.reports import comparison, efficiency, lineage, lineage_page, training
from jobs.reports.training import Incident
from jobs.state import audit_files, evaluation
from jobs.state.journal import Journal, points, read_journal
from jobs.state.run import Run
from jobs.state.run_metadata import CONFIGURATION, PROFILE, flattened, read_description, work_times
from pixart import records
from pixart.atomic import write_atomically
from pixart.html.page import Html, text
from slurm.task import attempts

SUMMARY, LINEAGE = "summary.html", "lineage.html"
PREVIEW = re.compile(r"step-[0-9]+\.png")


def write_pages(run: Run) -> None:
    """Write the pages whose content has changed, and log them as artifacts in the journal."""
    if run.kind == "train":
        write(run, SUMMARY, summary(run))
    write(run, LINEAGE, lineage_page.page(lineage.trace(run.home, str(run.folder)), run.folder))


def write(run: Run, name: str, content: str) -> None:
    """Write a page if its content has changed, and log it as an artifact."""
    path = run.folder / name
    if not path.exists() or path.read_text() != content:
        write_atomically(path, content)
        Journal(run.folder, "pages").artifact(path)


def main_page(run: Run) -> Path:
    """Return the path of the page to show first: the result of the run, else its lineage."""
    pages = {
        "train": run.folder / SUMMARY,
        "convert": Path(run.request.get("output", run.folder)) / REPORT_PAGE,
        "evaluate": Path(run.dataset) / evaluation.PAGE,
        "judge": Path(run.dataset) / evaluation.PAGE,
        "summarize": Path(run.request.get("folder", run.folder)) / evaluation.PAGE,
        "audit": Path(run.dataset) / audit_files.FOLDER / audit_files.PAGE,
    }
    path = pages.get(run.kind, run.folder / LINEAGE)
    return path if path.exists() else run.folder / LINEAGE


def summary(run: Run) -> str:
    """Return the summary page of a training run."""
    description = read_description(run.folder)
    lines, _ = read_journal(run.folder)
    curves = curves_of(lines)
    facts = {
        **results(run, description["status"], curves),
        "ranks": f"{run.ranks} on {run.nodes} node{'s' * (run.nodes > 1)}",
        **{key: value for key, value in description["parameters"].items() if key not in ("steps", "nodes")},
        "initial checkpoint": description["tags"].get("pixart.parent_checkpoint"),
        **times(run, description["begun"]),
        "jobs": ", ".join(run.job_ids),
        "commit": description["tags"].get("pixart.commit"),
        "folder": str(run.folder),
        **efficiency.facts(run),
    }
    present = {key: str(value) for key, value in facts.items() if value is not None}
    present |= {"pages": page_links(run)}
    previews = sorted(path for path in run.folder.glob("previews/step-*.png") if PREVIEW.fullmatch(path.name))
    return training.page(f"Training {run.folder.name}", present, curves, incidents(run, lines), previews)


def comparison_page(runs: Sequence[Run]) -> str:
    """Return the page that compares training runs. Raises ValueError for a run of another kind."""
    compared = []
    for run in runs:
        if run.kind != "train":
            raise ValueError(f"run {run.folder.name}: is a run of {run.kind}; only training runs are compared")
        lines, _ = read_journal(run.folder)
        curves = curves_of(lines)
        settings = flattened(records.read(run.folder / CONFIGURATION, dict[str, Any]))
        description = read_description(run.folder)
        settings |= {"nodes": run.nodes, "ranks": run.ranks, **description["parameters"]}
        figures = results(run, description["status"], curves)
        compared.append(comparison.ComparedRun(name=run.folder.name, results=figures, settings=settings, curves=curves))
    return comparison.page(compared)


def curves_of(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of each metric in the lines of a journal."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, value, _, step in points(lines, set()):
        curves.setdefault(key, []).append((step, value))
    for values in curves.values():
        values.sort()
    return curves


def results(run: Run, status: str, curves: Mapping[str, training.Points]) -> dict[str, str]:
    """Return the status, the steps and the results of a training run."""
    last = max((step for step, _ in curves.get("train/loss", [])), default=0)
    return {"status": status.lower(), "steps": f"{last:,} of {run.total:,}", **training.headline(curves)}


def times(run: Run, submitted: float) -> dict[str, str | None]:
    """Return when a run was submitted, began and ended, how long it waited and worked, and its GPU hours."""
    begin, end = work_times(run.folder)
    facts: dict[str, str | None] = {"submitted": moment(submitted)}
    if begin is None:
        return facts
    facts |= {"began": f"{moment(begin)}, after {format_duration(max(0.0, begin - submitted))} in the queue"}
    if end is None:
        return facts
    facts |= {"ended": moment(end), "duration": format_duration(end - begin)}
    profile = run.folder / PROFILE
    if profile.exists() and records.read(profile, dict[str, Any]).get("gpus_per_node"):  # also of an earlier version
        facts["GPU hours"] = f"{run.ranks * (end - begin) / 3600:.2f} on {run.ranks} GPUs, requeues included"
    return facts


def page_links(run: Run) -> Html:
    """Return links to the lineage, to each checkpoint and to the report of its conversion, relative to the folder."""
    links = [(LINEAGE, "lineage")]
    for checkpoint in sorted((run.folder / "checkpoints").glob("step-*/training.json")):
        folder = checkpoint.parent
        target = folder / REPORT_PAGE if (folder / REPORT_PAGE).exists() else checkpoint
        name = "conversion of " if target != checkpoint else ""
        links.append((target.relative_to(run.folder).as_posix(), f"{name}{folder.name}"))
    return Html(", ".join(f'<a href="{quote(target)}">{text(name)}</a>' for target, name in links))


def incidents(run: Run, lines: list[dict]) -> list[Incident]:
    """Return the incidents in the journal and the restarts of rank 0, in order of time."""
    events = [
        (line["time"], Incident(step=line["step"], description=line["incident"], when=moment(line["time"])))
        for line in lines
        if "incident" in line
    ]
    reported = [(line["time"], line["step"]) for line in lines if "train/loss" in line.get("metrics", {})]
    starts = [line for line in attempts(run.folder) if line["rank"] == 0]
    for line in starts[1:]:
        when = datetime.fromisoformat(line["time"]).timestamp()
        step = max((step for at, step in reported if at < when), default=None)
        cause = (
            f"requeued, attempt {line['restart'] + 1}" if line["restart"] else f"submitted again as job {line['job']}"
        )
        events.append((when, Incident(step=step, description=f"{cause}, on {line['node']}", when=moment(when))))
    return [one for _, one in sorted(events, key=itemgetter(0))]


def moment(seconds: float) -> str:
    """Return a time in seconds since the epoch as local date and time with its time zone."""
    return f"{datetime.fromtimestamp(seconds).astimezone():%Y-%m-%d %H:%M:%S %Z}"
