"""HTML page that compares training runs: their results, the settings in which they differ, and their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.reports import training
from jobs.reports.training import CHARTS, FP8_CHARTS, FURTHER_CHARTS, STEPS, Points
from pixart.html.page import document, table, text

SMOOTHED = "train/loss"
ABSENT = "-"


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A training run: its name, its results as text, its configuration by dotted key, and its curves by metric."""

    name: str
    results: Mapping[str, str]
    settings: Mapping[str, Any]
    curves: Mapping[str, Points]


def page(runs: Sequence[ComparedRun]) -> str:
    """Return the page. A metric that only one of the runs has logged is drawn too."""
    title = "Comparison of " + ", ".join(run.name for run in runs)
    labels = {key: label for _, label, _, keys in (*CHARTS, *FP8_CHARTS) for key in keys}
    labels |= {key: label for key, (label, _) in FURTHER_CHARTS.items()}
    drawn = "".join(section(key, label, runs) for key, label in labels.items())
    body = (
        f"<h1>{text(title)}</h1>\n<h2>Results</h2>{columns(runs, [run.results for run in runs])}"
        f"<h2>Settings that differ</h2>{columns(runs, differences(runs))}"
        f"{drawn or '<p>No step has been logged yet.</p>'}"
    )
    return document(title, body, training.STYLE)


def differences(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """Return the settings of each run that are not the same in all of them."""
    keys = sorted({key for run in runs for key in run.settings})
    differing = [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]
    return [{key: run.settings[key] for key in differing if key in run.settings} for run in runs]


def columns(runs: Sequence[ComparedRun], values: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one row for each key of the values, and one column for each run."""
    keys = list(dict.fromkeys(key for one in values for key in one))
    if not keys:
        return "<p>None.</p>\n"
    rows = [(key, *(str(one.get(key, ABSENT)) for one in values)) for key in keys]
    return table(("", *(run.name for run in runs)), rows)


def section(key: str, label: str, runs: Sequence[ComparedRun]) -> str:
    """Return a heading and a chart of one metric with a curve for each run; an empty text if no run has logged it."""
    caption = f"{key} by optimizer step."
    curves = {run.name: run.curves[key] for run in runs if run.curves.get(key)}
    if not curves:
        return ""
    if key == SMOOTHED:
        curves = {name: training.smoothed(points, training.half_window(points)) for name, points in curves.items()}
        caption += " It is smoothed by a moving average."
    return f"<h2>{text(key)}</h2>\n{training.figure(label, caption, curves, STEPS, (), metrics=[key])}"
