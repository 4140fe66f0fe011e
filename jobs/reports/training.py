"""HTML summary of a training run: curves, previews and incidents, from the run folder alone."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean, median

from pixart.html.charts import Series, chart, linear_axis, log_axis
from pixart.html.page import document, table, text

POINTS = 400  # per curve; of longer ones, each point is the mean of several values
SMOOTH = 20  # the smoothing window is 1/SMOOTH of a curve's points, at least five
SPREAD = 30.0  # ratio of largest to smallest value above which the axis of a LOGARITHMIC metric is logarithmic
LOGARITHMIC = {"train/loss", "train/grad_norm"}
SHOWN = 12  # previews on the page
PREVIEW_PIXELS = 1100
STYLE = """
.previews { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 14px; }
.previews figure { margin: 0; } .previews img { width: 100%; border: 1px solid var(--rule); }
.facts td:first-child { color: var(--soft); }
"""
STEPS, SECONDS = "optimizer step", "seconds since the run was submitted"
VALIDATION = ("val/loss", "val/loss_ema")
# Heading, label of the vertical axis, caption and metrics of each chart.
CHARTS = (
    ("Loss", "loss, mean squared error", "Loss of training, and of rows held out.", ("train/loss", *VALIDATION)),
    ("Gradient norm", "norm of the gradient", "Norm of all gradients before they are clipped.", ("train/grad_norm",)),
    ("Learning rate", "learning rate", "Learning rate that the optimizer stepped with.", ("train/lr",)),
    ("Throughput", "images per second", "Images of the global batch per second.", ("train/images_per_second",)),
)
# Label of the vertical axis and caption; in NODES also the label of the horizontal axis.
FURTHER = {
    "train/tokens_per_second": ("tokens per second", "Latent patches of the global batch per second."),
    "train/tflops_per_rank": ("TFLOP/s", "Operations of a step by count, for each rank."),
    "train/mfu": ("share of the peak", "Operations by count against the card's peak."),
    "train/data_loading_fraction": ("share of a step", "Time that a step waits for its batch."),
}
NODES = {
    "cpu_utilization_percentage": ("%", "Processors in use, of all of a node.", SECONDS),
    "load_average_1m": ("processes", "Processes that run or wait to, mean over a minute.", STEPS),
    "system_memory_usage_megabytes": ("MB", "Memory of a node that is in use.", SECONDS),
    "max_memory_allocated_gib": ("GiB", "Peak memory of the node's first rank: of its GPU, if it has one.", STEPS),
    "disk_available_megabytes": ("MB", "Room that is left where the run lies.", SECONDS),
    "gpu_utilization_percentage": ("%", "Time in which GPUs did something, mean over those of a node.", SECONDS),
    "gpu_memory_usage_megabytes": ("MB", "Memory of GPUs in use, mean over those of a node.", SECONDS),
    "gpu_power_usage_watts": ("W", "Power of GPUs, mean over those of a node.", SECONDS),
}
COLORS = 8  # colors that the style of the pages defines
SLOTS = ("input", "weight", "grad_output")
FP8_CHARTS = (
    (
        "FP8 headroom",
        "powers of two",
        "How many times the largest value may double before it saturates: the minimum over all linears.",
        tuple(f"fp8/headroom/{slot}_min" for slot in SLOTS),
    ),
    (
        "FP8 saturation",
        "share of steps",
        "Share of the last steps in which a tensor saturated: the maximum over all linears.",
        tuple(f"fp8/saturation_rate/{slot}_max" for slot in SLOTS),
    ),
)
Points = Sequence[tuple[int, float]]  # step, value


@dataclass(frozen=True, kw_only=True)
class Incident:
    """An event of a training run, such as a loss spike or a restart; `step` is None if it was before the first."""

    step: int | None
    what: str
    when: str


def page(
    title: str,
    facts: Mapping[str, object],
    curves: Mapping[str, Points],
    incidents: Sequence[Incident],
    previews: Sequence[Path],
) -> str:
    """Return the summary page. `curves` holds steps and values by metric; incidents with a step are drawn into them."""
    events = [(one.step, f"step {one.step}: {one.what}") for one in incidents if one.step is not None]
    drawn = "".join(section(heading, label, caption, keys, curves, events) for heading, label, caption, keys in CHARTS)
    drawn += "".join(section(*chosen, curves, events) for chosen in FP8_CHARTS)
    further = "".join(
        figure(*words, {key: curves[key]}, STEPS, events) for key, words in FURTHER.items() if key in curves
    )
    nodes = "".join(
        figure(label, caption, own, across, ())
        for name, (label, caption, across) in NODES.items()
        if (own := of_nodes(name, curves))
    )
    body = (
        f'<h1>{text(title)}</h1>\n<div class="facts">{table((), facts.items())}</div>'
        f"{told(incidents)}{gallery(previews)}{drawn or '<p>No step has been reported yet.</p>'}"
        f"{f'<h2>Further figures</h2>{further}' if further else ''}"
        f"{f'<details><summary>The nodes</summary>{nodes}</details>' if nodes else ''}"
    )
    return document(title, body, STYLE)


def section(
    heading: str,
    label: str,
    caption: str,
    keys: Sequence[str],
    curves: Mapping[str, Points],
    events: Sequence[tuple[int, str]],
) -> str:
    """Return a heading and a chart of the metrics `keys`; an empty text if none of them was logged."""
    there = {key: curves[key] for key in keys if key in curves}
    return f"<h2>{heading}</h2>\n{figure(label, caption, there, STEPS, events)}" if there else ""


def of_nodes(name: str, curves: Mapping[str, Points]) -> dict[str, Points]:
    """Return the curves of a system metric by node, in order."""
    keys = sorted(curves, key=lambda key: (len(key), key))
    return {key: curves[key] for key in keys if key.startswith("system/node_") and key.endswith(f"/{name}")}


def told(incidents: Sequence[Incident]) -> str:
    """Return the section with the table of incidents."""
    if not incidents:
        return "<h2>Incidents</h2>\n<p>None: one attempt, no step left out, no fallback.</p>\n"
    rows = [("-" if one.step is None else f"{one.step:,}", one.what, one.when) for one in incidents]
    return f"<h2>Incidents</h2>\n{table(('step', 'what happened', 'time'), rows)}"


def figure(
    label: str, caption: str, curves: Mapping[str, Points], across: str, events: Sequence[tuple[int, str]]
) -> str:
    """Return the chart of some metrics, with the training loss smoothed; `across` labels the horizontal axis."""
    every = [value for values in curves.values() for _, value in values if math.isfinite(value)]
    logarithmic = min(every, default=0) > 0 and max(every) > SPREAD * min(every) and bool(LOGARITHMIC & curves.keys())
    shown, grouped = [], 1
    for index, (key, values) in enumerate(curves.items()):
        few, group = reduced(values)
        grouped = max(grouped, group)
        smooth = key == "train/loss" and len(few) >= SMOOTH
        mark = "dot" if len(few) == 1 else "faint" if smooth else "curve"  # a single point has no visible line
        shown.append((key, few, f"var(--c{index % COLORS})", mark))
        if smooth:
            half = max(2, len(few) // SMOOTH // 2)
            shown.append((f"{key}, mean over {2 * half + 1} points", smoothed(few, half), "var(--c7)", "curve"))
    series = [
        Series(
            name=name,
            x=[step for step, _ in points],
            y=[math.log10(value) if logarithmic and value > 0 else value for _, value in points],
            titles=[f"{name}, {across} {step:,}: {value:.6g}" for step, value in points],
            color=color,
            mark=mark,
        )
        for name, points, color, mark in shown
    ]
    steps = [step for values in curves.values() for step, _ in values]
    x = linear_axis(across, (), min(steps), max(steps))
    if logarithmic:
        y = log_axis(label, math.floor(math.log10(min(every))), math.ceil(math.log10(max(every))))
    else:
        y = linear_axis(label, series)
    inside = [event for event in events if x.low <= event[0] <= x.high]
    more = f" Each point is the mean of {grouped}; the largest is {max(every, default=0):.4g}." if grouped > 1 else ""
    return chart(caption + more + (" Dashed lines are incidents." if inside else ""), series, x, y, inside)


def reduced(values: Points) -> tuple[list[tuple[int, float]], int]:
    """Average groups of consecutive values to at most POINTS points; return the points and the size of a group."""
    group = -(-len(values) // POINTS)
    groups = [values[begin : begin + group] for begin in range(0, len(values), group)]
    return [(own[len(own) // 2][0], fmean(value for _, value in own)) for own in groups], group


def smoothed(values: Points, half: int) -> list[tuple[int, float]]:
    """Return the moving average of the values, over `half` points on either side."""
    heights = [value for _, value in values]
    return [(step, fmean(heights[max(0, at - half) : at + half + 1])) for at, (step, _) in enumerate(values)]


def gallery(previews: Sequence[Path]) -> str:
    """Return the section with at most SHOWN previews, evenly spaced."""
    if not previews:
        return ""
    chosen = [previews[round(index * (len(previews) - 1) / (SHOWN - 1))] for index in range(SHOWN)]
    figures = "".join(preview(path) for path in dict.fromkeys(chosen if len(previews) > SHOWN else previews))
    return (
        f"<h2>Previews</h2>\n<p>Samples of the average at {len(previews)} steps, the same prompts and noise.</p>\n"
        f'<div class="previews">{figures}</div>\n'
    )


def preview(path: Path) -> str:
    """Return a preview as a figure with the image embedded as JPEG."""
    from PIL import Image

    small = BytesIO()
    with Image.open(path) as picture:
        copy = picture.convert("RGB")
        copy.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS))
        copy.save(small, "JPEG", quality=85)
    step = int(path.stem.removeprefix("step-"))
    source = b64encode(small.getvalue()).decode()
    return (
        f'<figure><img alt="samples at step {step}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def headline(curves: Mapping[str, Points]) -> dict[str, str]:
    """Return the headline results: training loss, validation loss and throughput."""
    found = {}
    if loss := curves.get("train/loss"):
        last = loss[-max(1, len(loss) // SMOOTH) :]
        of = f"mean of the last {len(last)} reports" if len(last) > 1 else "last report"
        found["loss"] = f"{fmean(value for _, value in last):.4f} ({of})"
    if held_out := curves.get("val/loss_ema"):
        found["held out"] = f"{held_out[-1][1]:.4f}, of the average, at step {held_out[-1][0]:,}"
    if rate := curves.get("train/images_per_second"):
        found["throughput"] = f"{median(value for _, value in rate):,.1f} images per second (median)"
    return found
