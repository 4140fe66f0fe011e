"""HTML summary of a training run: curves, previews and incidents, from the run folder alone."""

import math
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from statistics import fmean, median

from pixart.html.charts import Series, chart, linear_axis, log_axis
from pixart.html.page import COLORS, document, table, text

MAX_POINTS = 400  # per curve; in longer curves, each point is the mean of several values
SMOOTHING_DIVISOR = 20  # a curve's number of points divided by this is the smoothing window, at least five
MIN_LOG_RATIO = 30.0  # ratio of maximum to minimum above which a LOG_SCALE_METRICS axis is logarithmic
LOG_SCALE_METRICS = {"train/loss", "train/grad_norm"}
MAX_TABLE_ROWS = 20  # of the table beside a chart
MAX_PREVIEWS = 12  # previews on the page
PREVIEW_PIXELS = 1100
STYLE = """
.previews { display: flex; overflow-x: auto; scroll-snap-type: x mandatory; gap: 14px; max-height: none; }
.previews figure { margin: 0; flex: 0 0 max(100%, 760px); scroll-snap-align: start; }
.previews img { width: 100%; border: 1px solid var(--rule); }
.facts .scroll { max-height: none; }
.steps { display: flex; flex-wrap: wrap; gap: .3rem .8rem; list-style: none; padding: 0; }
details { margin: 0 0 1rem; }
.facts td:first-child { color: var(--soft); }
"""
STEPS, SECONDS = "optimizer step", "seconds since the run was submitted"
VALIDATION = ("val/loss", "val/loss_ema")
# Heading, label of the vertical axis, caption and metrics of each chart.
CHARTS = (
    ("Loss", "loss, mean squared error", "Training loss and validation loss.", ("train/loss", *VALIDATION)),
    ("Gradient norm", "norm of the gradient", "Norm of all gradients before clipping.", ("train/grad_norm",)),
    ("Learning rate", "learning rate", "Learning rate of the optimizer step.", ("train/lr",)),
    ("Throughput", "images per second", "Images of the global batch per second.", ("train/images_per_second",)),
)
# Label of the vertical axis and caption; in NODE_CHARTS also the label of the horizontal axis.
FURTHER_CHARTS = {
    "train/tokens_per_second": ("tokens per second", "Latent patches of the global batch per second."),
    "train/tflops_per_rank": ("TFLOP/s", "Counted operations per second and rank."),
    "train/mfu": ("fraction of peak", "Model FLOPs utilization: counted operations relative to the peak of the GPU."),
    "train/data_loading_fraction": ("fraction of a step", "Fraction of the step time spent waiting for the batch."),
}
NODE_CHARTS = {
    "cpu_utilization_percentage": ("%", "CPU utilization of a node.", SECONDS),
    "load_average_1m": ("processes", "Load average of a node over one minute.", STEPS),
    "system_memory_usage_megabytes": ("MB", "System memory usage of a node.", SECONDS),
    "max_memory_allocated_gib": (
        "GiB",
        "Peak memory of the node's first rank; GPU memory if the node has GPUs.",
        STEPS,
    ),
    "disk_available_megabytes": ("MB", "Available space on the disk of the run folder.", SECONDS),
    "gpu_utilization_percentage": ("%", "GPU utilization, mean over the GPUs of a node.", SECONDS),
    "gpu_memory_usage_megabytes": ("MB", "GPU memory usage, mean over the GPUs of a node.", SECONDS),
    "gpu_power_usage_watts": ("W", "GPU power, mean over the GPUs of a node.", SECONDS),
}
SLOTS = ("input", "weight", "grad_output")
FP8_CHARTS = (
    (
        "FP8 headroom",
        "powers of two",
        "Headroom: doublings of the amax until saturation, minimum over all linears.",
        tuple(f"fp8/headroom/{slot}_min" for slot in SLOTS),
    ),
    (
        "FP8 saturation",
        "fraction of steps",
        "Saturation rate: fraction of recent steps in which a tensor saturated, maximum over all linears.",
        tuple(f"fp8/saturation_rate/{slot}_max" for slot in SLOTS),
    ),
)
Points = Sequence[tuple[int, float]]  # step, value


@dataclass(frozen=True, kw_only=True)
class Incident:
    """An event of a training run, such as a loss spike or a restart; `step` is None if it was before the first."""

    step: int | None
    description: str
    when: str


def page(
    title: str,
    facts: Mapping[str, object],
    curves: Mapping[str, Points],
    incidents: Sequence[Incident],
    previews: Sequence[Path],
) -> str:
    """Return the summary page. `curves` holds steps and values by metric; incidents with a step are drawn into them."""
    events = [(one.step, f"step {one.step}: {one.description}") for one in incidents if one.step is not None]
    charts = "".join(section(heading, label, caption, keys, curves, events) for heading, label, caption, keys in CHARTS)
    charts += "".join(section(*chosen, curves, events) for chosen in FP8_CHARTS)
    further_charts = "".join(
        figure(*words, {key: curves[key]}, STEPS, events) for key, words in FURTHER_CHARTS.items() if key in curves
    )
    nodes = "".join(
        figure(label, caption, node_curves, across, ())
        for name, (label, caption, across) in NODE_CHARTS.items()
        if (node_curves := curves_by_node(name, curves))
    )
    body = (
        f'<h1>{text(title)}</h1>\n<div class="facts">{table((), facts.items())}</div>'
        f"{incident_section(incidents)}{gallery(previews)}{charts or '<p>No step has been logged yet.</p>'}"
        f"{f'<h2>Further metrics</h2>{further_charts}' if further_charts else ''}"
        f"{f'<details><summary>Nodes</summary>{nodes}</details>' if nodes else ''}"
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
    logged = {key: curves[key] for key in keys if key in curves}
    return f"<h2>{heading}</h2>\n{figure(label, caption, logged, STEPS, events)}" if logged else ""


def curves_by_node(name: str, curves: Mapping[str, Points]) -> dict[str, Points]:
    """Return the curves of a system metric by node, in order."""
    keys = sorted(curves, key=lambda key: (len(key), key))
    return {key: curves[key] for key in keys if key.startswith("system/node_") and key.endswith(f"/{name}")}


def incident_section(incidents: Sequence[Incident]) -> str:
    """Return the section with the table of incidents."""
    if not incidents:
        return "<h2>Incidents</h2>\n<p>None: one attempt, no skipped step, no fallback.</p>\n"
    rows = [("-" if one.step is None else f"{one.step:,}", one.description, one.when) for one in incidents]
    return f"<h2>Incidents</h2>\n{table(('step', 'event', 'time'), rows)}"


def figure(
    label: str,
    caption: str,
    curves: Mapping[str, Points],
    across: str,
    events: Sequence[tuple[int, str]],
    *,
    metrics: Collection[str] = (),
) -> str:
    """Return the chart of some metrics, with the training loss smoothed; `across` labels the horizontal axis.

    `metrics` are those that the chart is about if the keys of `curves` are other names.
    """
    every = [value for values in curves.values() for _, value in values if math.isfinite(value)]
    logarithmic = (
        min(every, default=0) > 0
        and max(every) > MIN_LOG_RATIO * min(every)
        and bool(LOG_SCALE_METRICS & set(metrics or curves))
    )
    shown, grouped = [], 1
    for index, (key, values) in enumerate(curves.items()):
        few, group = reduced(values)
        grouped = max(grouped, group)
        smooth = key == "train/loss" and len(few) >= SMOOTHING_DIVISOR
        mark = "dot" if len(few) == 1 else "faint" if smooth else "curve"  # a single point has no visible line
        shown.append((key, few, f"var(--c{index % COLORS})", mark))
        if smooth:
            half = half_window(few)
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
    x = linear_axis(across, (), min(steps) if min(steps) < max(steps) else 0, max(steps))
    if logarithmic:
        y = log_axis(label, math.floor(math.log10(min(every))), math.ceil(math.log10(max(every))))
    else:
        y = linear_axis(label, series)
    inside = [event for event in events if x.low <= event[0] <= x.high]
    more = f" Each point is the mean of {grouped}; the largest is {max(every, default=0):.4g}." if grouped > 1 else ""
    drawn = chart(caption + more + (" Dashed lines are incidents." if inside else ""), series, x, y, inside)
    return drawn + values_table(across, {name: points for name, points, _, _ in shown})


def values_table(across: str, curves: Mapping[str, Points]) -> str:
    """Return the values of a chart as a table that opens, at most MAX_TABLE_ROWS evenly spaced ones."""
    columns = {name: dict(points) for name, points in curves.items()}
    steps = sorted({step for values in columns.values() for step in values})
    count = min(len(steps), MAX_TABLE_ROWS)
    chosen = dict.fromkeys(steps[round(index * (len(steps) - 1) / max(1, count - 1))] for index in range(count))
    rows = [(step, *(values.get(step) for values in columns.values())) for step in chosen]
    return f"<details><summary>Values</summary>{table((across, *columns), rows)}</details>\n"


def reduced(values: Points) -> tuple[list[tuple[int, float]], int]:
    """Average groups of consecutive values to at most MAX_POINTS points; return the points and the size of a group."""
    group_size = -(-len(values) // MAX_POINTS)
    groups = [values[begin : begin + group_size] for begin in range(0, len(values), group_size)]
    return [(group[len(group) // 2][0], fmean(value for _, value in group)) for group in groups], group_size


def half_window(values: Points) -> int:
    """Return how many points on either side of one a moving average of the values takes."""
    return max(2, len(values) // SMOOTHING_DIVISOR // 2)


def smoothed(values: Points, half: int) -> list[tuple[int, float]]:
    """Return the moving average of the values, over `half` points on either side."""
    heights = [value for _, value in values]
    return [(step, fmean(heights[max(0, at - half) : at + half + 1])) for at, (step, _) in enumerate(values)]


def gallery(previews: Sequence[Path]) -> str:
    """Return the section with at most MAX_PREVIEWS previews, evenly spaced."""
    if not previews:
        return ""
    chosen = [previews[round(index * (len(previews) - 1) / (MAX_PREVIEWS - 1))] for index in range(MAX_PREVIEWS)]
    shown = list(dict.fromkeys(chosen if len(previews) > MAX_PREVIEWS else previews))
    figures = "".join(preview(path) for path in shown)
    steps = [int(path.stem.removeprefix("step-")) for path in shown]
    links = [f'<li><a href="#preview-{step}">step {step:,}</a></li>' for step in steps]
    return (
        f"<h2>Previews</h2>\n<p>EMA samples at {len(previews)} checkpoints, with the same prompts and noise.</p>\n"
        f'<ul class="steps">{"".join(links)}</ul>\n'
        f'<div class="previews scroll" tabindex="0" role="region" aria-label="previews by step">{figures}</div>\n'
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
        f'<figure id="preview-{step}"><img alt="samples at step {step}" src="data:image/jpeg;base64,{source}">'
        f"<figcaption>step {step:,}</figcaption></figure>"
    )


def headline(curves: Mapping[str, Points]) -> dict[str, str]:
    """Return the headline results: training loss, validation loss and throughput."""
    results = {}
    if loss := curves.get("train/loss"):
        last = loss[-max(1, len(loss) // SMOOTHING_DIVISOR) :]
        of = f"mean of the last {len(last)} reports" if len(last) > 1 else "last report"
        results["loss"] = f"{fmean(value for _, value in last):.4f} ({of})"
    if validation := curves.get("val/loss_ema"):
        results["validation loss"] = f"{validation[-1][1]:.4f} (EMA weights, step {validation[-1][0]:,})"
    if rate := curves.get("train/images_per_second"):
        results["throughput"] = f"{median(value for _, value in rate):,.1f} images per second (median)"
    return results
