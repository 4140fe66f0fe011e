"""A conversion's report as one HTML page that needs nothing beside it: no script, no font, no network."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from conversion.options import STATEFUL
from pixart.html.charts import MARKS, Axis, Series, chart, drawable, kinds_axis, linear_axis, log_axis, within
from pixart.html.page import badge, document, emphasis, table, text
from pixart.model.fp8.ops import SLOTS

BLOCK = re.compile(r"dit_blocks\.(\d+)\.(.+)")
TENSORS = ("input", "weight", "output", "weight_gradient")  # that an SQNR is of
COLORS = [f"var(--c{index})" for index in range(8)]


def page(report: Mapping[str, Any]) -> str:
    """The report of `to_fp8.convert`, its gate included, as an HTML document."""
    word = "PASS" if report["gate"]["passed"] else "FAIL"
    sections = (gate, origin, stages, losses, layers, plan, fates)
    title = f"{word}: conversion of {report['source']} to FP8"
    return document(title, "".join(section(report) for section in sections))


def gate(report: Mapping[str, Any]) -> str:
    checks = report["gate"]["checks"]
    passed = report["gate"]["passed"]
    rows = [(check["name"], check["value"], check["limit"], badge(check["passed"])) for check in checks]
    failed = "; ".join(
        f"{check['name']}: {check['value']}, limit {check['limit']}" for check in checks if not check["passed"]
    )
    alarm = (
        ""
        if passed
        else f'<p class="alarm failed"><b>This conversion failed its checks.</b> {text(failed)}.<br>'
        "Training takes the checkpoint with --accept-failed-conversion only.</p>\n"
    )
    return f"<h1>Conversion to FP8 {badge(passed)}</h1>\n{alarm}{table(('check', 'value', 'limit', ''), rows)}"


def origin(report: Mapping[str, Any]) -> str:
    before, after = report["stages"]
    sizes = ", ".join(f"{key} {value}" for key, value in report["config"].items() if value is not None)
    rows = {
        "source": report["source"],
        "format": report["source_format"],
        "SHA-256": report["source_sha256"],
        "output": report["output"],
        "stage": f"{before} to {after}" if before != after else f"{after}, unchanged",
        "step": str(report["step"]),
        "configuration": f"{sizes} ({'inferred from shapes' if report['inferred'] else 'its own'})",
        "calibration data": report["data"],
        "calibration": f"{report['batches']} batches of {report['batch']} images, statistic {report['statistic']}",
        "recipe": f"{report['recipe']}, margin {report['margin']} (powers of two), amax history {report['history']}",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    alarm = (
        '<p class="alarm"><b>The scales come from synthetic data.</b> '
        "Scales that fit a run need the run's own dataset, named by --data.</p>\n"
    )
    synthetic = report["data"].startswith("synthetic")
    return f"<h2>What was read and written</h2>\n{alarm if synthetic else ''}{table((), rows.items())}"


def stages(report: Mapping[str, Any]) -> str:
    found = report["reparameterization"]
    if found is None:
        return ""
    curves = found["output_error"]
    positive = [value for errors in curves.values() for value in errors if drawable(value) and value > 0] or [1.0]
    floor = math.floor(math.log10(min(positive)))
    axis = log_axis("relative error", floor, max(floor + 1, math.ceil(math.log10(max(positive)))))
    series = [
        Series(
            name=way + (" (written)" if way == found["way"] else ""),
            x=found["t"],
            y=[math.log10(max(error, 10.0**floor)) if drawable(error) else None for error in errors],
            titles=[f"{way}, t = {t:.3f}: {text(error)}" for t, error in zip(found["t"], errors, strict=True)],
            color=COLORS[index % len(COLORS)],
            mark=list(MARKS)[index % len(MARKS)],
        )
        for index, (way, errors) in enumerate(curves.items())
    ]
    caption = (
        "Relative RMS error of the velocity against stage 1 without a class, over t. An error of 0 is at the floor."
    )
    ticks = [(tenth / 10, f"{tenth / 10:g}") for tenth in range(0, 11, 2)]
    rows = [
        (way, found["mean_error"][way], found["sample_error"][way], "written" if way == found["way"] else "")
        for way in curves
    ]
    return (
        "<h2>Stage 1 to stage 2</h2>\n"
        + chart(caption, series, Axis(label="t", low=0, high=1, ticks=ticks), axis)
        + table(("way", "mean error over t", "error of samples", ""), rows)
    )


def losses(report: Mapping[str, Any]) -> str:
    values = list(report["losses"].values())
    changes = ["", *(f"{new / old - 1:+.3%}" for old, new in pairwise(values))]
    rows = [(name, f"{loss:.6f}", more) for (name, loss), more in zip(report["losses"].items(), changes, strict=True)]
    cosine = report["gradient_cosine"]
    known = f"{cosine:.5f}" if cosine is not None else "not known, as the gradients are zero"
    return (
        f"<h2>Losses</h2>\n{table(('on batches held out', 'loss', 'against the row above'), rows)}"
        f"<p>Cosine of a first step's weight gradients, FP8 against BF16: {known}.</p>\n"
    )


def layers(report: Mapping[str, Any]) -> str:
    found = report["layers"]
    title = "<h2>Layers in FP8</h2>\n"
    if not found:
        return f"{title}<p>No layer was measured.</p>\n"
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in found:
        kinds.setdefault(kind_of(layer["name"])[1], []).append(layer)
    keeps_scales = report["recipe"] == STATEFUL
    blocks = 1 + max(kind_of(layer["name"])[0] for layer in found)
    axis = kinds_axis(list(kinds), blocks)

    def series(name: str, values: Sequence[float | None], kind: str, color: str, mark: str, unit: str) -> Series:
        own, panel = kinds[kind], list(kinds).index(kind)
        return Series(
            name=name,
            x=[within(panel, kind_of(layer["name"])[0], blocks) for layer in own],
            y=values,
            titles=[f"{layer['name']}, {name}: {text(value)}{unit}" for layer, value in zip(own, values, strict=True)],
            color=color,
            mark=mark,
        )

    decibels = [
        series(name, [weight_gradient(layer, key) for layer in own], kind, COLORS[index % len(COLORS)], mark, " dB")
        for index, (kind, own) in enumerate(kinds.items())
        for name, key, mark in (
            ("calibrated" if keeps_scales else report["recipe"], "sqnr", "dot"),
            ("dynamic", "dynamic", "ring"),
            ("forward only", "forward_only", "cross"),
        )
        if keeps_scales or key != "forward_only"
    ]
    headroom = [
        series(name, [layer["headroom"][slot] for layer in own], kind, COLORS[slot], mark, "")
        for kind, own in kinds.items()
        for slot, (name, mark) in enumerate(zip(SLOTS, MARKS, strict=True))
    ]
    gaps = [
        (dynamic - own, layer["name"])
        for layer in found
        if drawable(own := weight_gradient(layer, "sqnr")) and drawable(dynamic := weight_gradient(layer, "dynamic"))
    ]
    outputs = [layer["outputs"] for layer in found]
    some = "Of large linears some outputs stand for all. " if any(own[0] < own[1] for own in outputs) else ""
    worst = "The largest gap below dynamic scaling is {:.3f} dB, of {}.".format(*max(gaps)) if gaps else ""
    return (
        f"{title}<h3>Signal to quantization noise of the weight gradient</h3>\n"
        + chart(
            "SQNR by block and kind of linear. Dynamic scaling measures each tensor's scale anew, so that its largest "
            "value is exact; the gate compares with one that rounds alike. "
            f"{'Forward only leaves the scale of the gradient at 1. ' if keeps_scales else ''}{some}{worst}",
            decibels,
            axis,
            linear_axis("SQNR, dB", decibels),
        )
        + "<h3>Headroom</h3>\n"
        + chart(
            "Powers of two between a tensor's amax on batches held out and what FP8 holds at its scale, by block and "
            "kind of linear. Below 0 a tensor saturates.",
            headroom,
            axis,
            linear_axis("headroom, powers of two", headroom, 0),
        )
        + f"<details><summary>All {len(found)} layers</summary>\n{layer_table(found)}</details>\n"
    )


def weight_gradient(layer: Mapping[str, Any], key: str) -> float | None:
    return layer.get(key, {}).get("weight_gradient")


def layer_table(found: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        (
            layer["name"],
            *layer["amax"],
            *(emphasis(value, value is not None and value < 0) for value in layer["headroom"]),
            *(share and 100 * share for share in layer["underflow"]),
            *(emphasis(share and 100 * share, bool(share)) for share in layer["overflow"]),
            *(layer["sqnr"][name] for name in TENSORS),
            weight_gradient(layer, "dynamic"),
            weight_gradient(layer, "forward_only"),
        )
        for layer in found
    ]
    groups = [("", 1), *((name, 3) for name in ("amax", "headroom, powers of two", "underflow, %", "overflow, %"))]
    slots = [slot.removesuffix("_output") for slot in SLOTS] * 4
    of_sqnr = [name.replace("_", " ") for name in TENSORS]
    head = ("layer", *slots, *of_sqnr, "dynamic", "forward only")
    return table(head, rows, groups=[*groups, ("SQNR, dB", 4), ("of weight gradient", 2)])


def plan(report: Mapping[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in report["kept"].items():
        reasons.setdefault(reason, []).append(name)
    rows = [(reason, len(names), folded(names)) for reason, names in reasons.items()]
    unmeasured = report["unmeasured"]
    zero = (
        f"<p>{len(unmeasured)} tensors were zero in every batch. Their scales follow in training: "
        f"{text(folded(unmeasured))}.</p>\n"
    )
    return (
        f"<h2>Plan</h2>\n<p>{report['linears']} linears run in FP8; {len(report['kept'])} stay in BF16.</p>\n"
        f"{table(('reason to stay in BF16', 'linears', ''), rows)}{zero if unmeasured else ''}"
    )


def fates(report: Mapping[str, Any]) -> str:
    every = table(("tensor", "fate"), report["tensors"].items())
    return (
        f"<h2>Fates of tensors</h2>\n{table(('fate', 'tensors'), report['fates'].items())}"
        f"<details><summary>All {len(report['tensors'])} tensors</summary>\n{every}</details>\n"
    )


def kind_of(name: str) -> tuple[int, str]:
    """A linear's block, and its name within the block."""
    found = BLOCK.fullmatch(name)
    return (int(found[1]), found[2]) if found else (0, name)


def folded(names: Iterable[str]) -> str:
    """Names that differ by nothing but the block as one: `dit_blocks.{0-2,5}.mlp.linear1`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        own = blocks.setdefault(kind_of(name)[1], [])
        own += [kind_of(name)[0]] if BLOCK.fullmatch(name) else []
    return ", ".join(f"dit_blocks.{{{ranges(own)}}}.{kind}" if own else kind for kind, own in blocks.items())


def ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
