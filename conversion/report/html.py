"""The report of a conversion as one self-contained HTML page, without scripts, fonts or network access."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from conversion.options import STATEFUL
from conversion.report.layer_names import block_and_kind, fold_names
from conversion.report.text import (
    DECAYED_QK_NORM,
    SYNTHETIC,
    UNTRAINED_GUIDANCE,
    describe_extra_states,
    describe_unused_entries,
    is_guidance_untrained,
)
from pixart.html.charts import MARKS, Axis, Series, chart, drawable, kinds_axis, linear_axis, log_axis, within
from pixart.html.page import badge, document, emphasis, table, text
from pixart.model.fp8.ops import SLOTS

SQNR_TENSORS = ("input", "weight", "output", "grad_weight")
COLORS = [f"var(--c{index})" for index in range(8)]


def page(report: Mapping[str, Any]) -> str:
    """Render the report of `convert` as an HTML document."""
    verdict = "PASS" if report["acceptance"]["passed"] else "FAIL"
    sections = (acceptance, source, strategies, losses, layers, plan, tensor_provenance)
    title = f"{verdict}: conversion of {report['source']} to FP8"
    return document(title, "".join(section(report) for section in sections))


def acceptance(report: Mapping[str, Any]) -> str:
    checks = report["acceptance"]["checks"]
    passed = report["acceptance"]["passed"]
    rows = [(check["name"], check["value"], check["limit"], badge(check["passed"])) for check in checks]
    failed = "; ".join(
        f"{check['name']}: {check['value']}, limit {check['limit']}" for check in checks if not check["passed"]
    )
    alarm = (
        ""
        if passed
        else f'<p class="alarm failed"><b>This conversion failed its acceptance checks.</b> {text(failed)}.<br>'
        "Training accepts the checkpoint only with --accept-failed-conversion.</p>\n"
    )
    head = ("acceptance check", "value", "limit", "")
    return f"<h1>Conversion to FP8 {badge(passed)}</h1>\n{alarm}{table(head, rows)}"


def source(report: Mapping[str, Any]) -> str:
    before, after = report["stages"]
    sizes = ", ".join(f"{key} {value}" for key, value in report["config"].items() if value is not None)
    batches = f"{report['num_batches']} batches of {report['batch_size']} images"
    rows = {
        "source": report["source"],
        "format": report["source_format"],
        "SHA-256": report["source_sha256"],
        "output": report["output"],
        "stage": f"{before} to {after}" if before != after else f"{after}, unchanged",
        "step": str(report["step"]),
        "configuration": f"{sizes} ({'inferred from shapes' if report['config_inferred'] else 'stored in the source'})",
        "calibration data": report["calibration_data"],
        "latents": ", ".join(f"{height} x {width}" for height, width in report["calibration_latents"]),
        "calibration": f"{batches}, amax statistic {report['amax_statistic']}",
        "FP8 recipe": f"{report['fp8_recipe']}, margin {report['margin']} (powers of two), amax history of "
        f"{report['amax_history_len']} rows",
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    if report["skipped_extra_states"]:
        rows["skipped"] = describe_extra_states(report["skipped_extra_states"])
    if report["unused_entries"]:
        rows["unused"] = describe_unused_entries(report["unused_entries"])
    if report["decay_qk_norm"]:
        rows["weight decay"] = DECAYED_QK_NORM
    alarm = (
        '<p class="alarm"><b>The scales were calibrated on synthetic data.</b> '
        "Give --dataset to calibrate on the training data.</p>\n"
    )
    synthetic = report["calibration_data"].startswith(SYNTHETIC)
    guidance = f'<p class="alarm">{text(UNTRAINED_GUIDANCE)}</p>\n' if is_guidance_untrained(report) else ""
    return f"<h2>Source and settings</h2>\n{alarm if synthetic else ''}{guidance}{table((), rows.items())}"


def strategies(report: Mapping[str, Any]) -> str:
    errors = report["reparameterization"]
    if errors is None:
        return ""
    curves = errors["output_error"]
    positive = [value for curve in curves.values() for value in curve if drawable(value) and value > 0] or [1.0]
    floor = math.floor(math.log10(min(positive)))
    axis = log_axis("relative error", floor, max(floor + 1, math.ceil(math.log10(max(positive)))))
    series = [
        Series(
            name=strategy + (" (written)" if strategy == errors["strategy"] else ""),
            x=errors["t"],
            y=[math.log10(max(error, 10.0**floor)) if drawable(error) else None for error in curve],
            titles=[f"{strategy}, t = {t:.3f}: {text(error)}" for t, error in zip(errors["t"], curve, strict=True)],
            color=COLORS[index % len(COLORS)],
            mark=list(MARKS)[index % len(MARKS)],
        )
        for index, (strategy, curve) in enumerate(curves.items())
    ]
    caption = (
        "Relative RMS error of the velocity against stage 1 with the null class, by t. An error of 0 is drawn at the "
        "bottom."
    )
    ticks = [(tenth / 10, f"{tenth / 10:g}") for tenth in range(0, 11, 2)]
    rows = [
        (
            name,
            errors["mean_error"][name],
            errors["sample_error"][name],
            "written" if name == errors["strategy"] else "",
        )
        for name in curves
    ]
    return (
        "<h2>Re-parameterization of stage 1 as stage 2</h2>\n"
        + chart(caption, series, Axis(label="t", low=0, high=1, ticks=ticks), axis)
        + table(("strategy", "mean error over t", "error of samples", ""), rows)
    )


def losses(report: Mapping[str, Any]) -> str:
    values = list(report["losses"].values())
    changes = ["", *(f"{new / old - 1:+.3%}" for old, new in pairwise(values))]
    rows = [(name, f"{loss:.6f}", more) for (name, loss), more in zip(report["losses"].items(), changes, strict=True)]
    cosine = report["gradient_cosine_similarity"]
    similarity = f"{cosine:.5f}" if cosine is not None else "undefined, because the gradients are zero"
    return (
        f"<h2>Losses</h2>\n{table(('model', 'loss on validation batches', 'change from the row above'), rows)}"
        f"<p>Cosine similarity of FP8 and BF16 weight gradients in the first step: {similarity}.</p>\n"
    )


def layers(report: Mapping[str, Any]) -> str:
    measured = report["layers"]
    title = "<h2>Layers in FP8</h2>\n"
    if not measured:
        return f"{title}<p>No layer was measured.</p>\n"
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in measured:
        kinds.setdefault(block_and_kind(layer["name"])[1], []).append(layer)
    stores_scales = report["fp8_recipe"] == STATEFUL
    blocks = 1 + max(block_and_kind(layer["name"])[0] for layer in measured)
    axis = kinds_axis(list(kinds), blocks)

    def series(name: str, values: Sequence[float | None], kind: str, color: str, mark: str, unit: str) -> Series:
        group, panel = kinds[kind], list(kinds).index(kind)
        return Series(
            name=name,
            x=[within(panel, block_and_kind(layer["name"])[0], blocks) for layer in group],
            y=values,
            titles=[
                f"{layer['name']}, {name}: {text(value)}{unit}" for layer, value in zip(group, values, strict=True)
            ],
            color=color,
            mark=mark,
        )

    sqnr = [
        series(name, [grad_weight_sqnr(layer, key) for layer in group], kind, COLORS[index % len(COLORS)], mark, " dB")
        for index, (kind, group) in enumerate(kinds.items())
        for name, key, mark in (
            ("calibrated" if stores_scales else report["fp8_recipe"], "sqnr_db", "dot"),
            ("dynamic", "dynamic_sqnr_db", "ring"),
            ("forward only", "forward_only_sqnr_db", "cross"),
        )
        if stores_scales or key != "forward_only_sqnr_db"
    ]
    headroom = [
        series(name, [layer["headroom_bits"][slot] for layer in group], kind, COLORS[slot], mark, " bits")
        for kind, group in kinds.items()
        for slot, (name, mark) in enumerate(zip(SLOTS, MARKS, strict=True))
    ]
    gaps = [
        (dynamic - actual, layer["name"])
        for layer in measured
        if drawable(actual := grad_weight_sqnr(layer, "sqnr_db"))
        and drawable(dynamic := grad_weight_sqnr(layer, "dynamic_sqnr_db"))
    ]
    outputs = [layer["sampled_outputs"] for layer in measured]
    is_sampled = any(sampled < total for sampled, total in outputs)
    notes = [
        "SQNR of grad_weight by block and kind of linear.",
        "Dynamic scaling computes each tensor's scale from its current values; the acceptance check compares with "
        "dynamic scales that differ from the calibrated ones by powers of two, so that both round alike.",
    ]
    if stores_scales:
        notes.append("Forward only leaves the scale of grad_output at 1.")
    if is_sampled:
        notes.append("Large linears are measured on a sample of their outputs.")
    if gaps:
        notes.append("The largest SQNR loss vs. dynamic scaling is {:.3f} dB, in {}.".format(*max(gaps)))
    return (
        f"{title}<h3>Signal-to-quantization-noise ratio (SQNR) of grad_weight</h3>\n"
        + chart(" ".join(notes), sqnr, axis, linear_axis("SQNR, dB", sqnr))
        + "<h3>Headroom</h3>\n"
        + chart(
            "Powers of two between a tensor's amax on the validation batches and the largest value that FP8 represents "
            "at its scale, by block and kind of linear. Below 0 the tensor saturates.",
            headroom,
            axis,
            linear_axis("headroom, bits", headroom, 0),
        )
        + f"<details><summary>All {len(measured)} layers</summary>\n{layer_table(measured)}</details>\n"
    )


def grad_weight_sqnr(layer: Mapping[str, Any], key: str) -> float | None:
    """Return the SQNR of grad_weight in dB from one of a layer's measurements, or None if it was not measured."""
    return layer.get(key, {}).get("grad_weight")


def layer_table(measured: Iterable[Mapping[str, Any]]) -> str:
    """Render the table of all measured layers."""
    rows = [
        (
            layer["name"],
            *layer["amax"],
            *(emphasis(value, value is not None and value < 0) for value in layer["headroom_bits"]),
            *(rate and 100 * rate for rate in layer["underflow_rate"]),
            *(emphasis(rate and 100 * rate, bool(rate)) for rate in layer["saturation_rate"]),
            *(layer["sqnr_db"][name] for name in SQNR_TENSORS),
            grad_weight_sqnr(layer, "dynamic_sqnr_db"),
            grad_weight_sqnr(layer, "forward_only_sqnr_db"),
        )
        for layer in measured
    ]
    groups = [("", 1), *((name, 3) for name in ("amax", "headroom, bits", "underflow, %", "saturation, %"))]
    slots = [slot.removesuffix("_output") for slot in SLOTS] * 4
    head = ("layer", *slots, *SQNR_TENSORS, "dynamic", "forward only")
    return table(head, rows, groups=[*groups, ("SQNR, dB", 4), ("SQNR of grad_weight, dB", 2)])


def plan(report: Mapping[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in report["kept_in_bf16"].items():
        reasons.setdefault(reason, []).append(name)
    rows = [(reason, len(names), fold_names(names)) for reason, names in reasons.items()]
    uncalibrated = report["uncalibrated"]
    zero = (
        f"<p>{len(uncalibrated)} tensors were zero in every batch; delayed scaling sets their scales in training: "
        f"{text(fold_names(uncalibrated))}.</p>\n"
    )
    return (
        f"<h2>FP8 plan</h2>\n<p>{report['num_fp8_linears']} linears run in FP8; {len(report['kept_in_bf16'])} layers "
        f"stay in BF16.</p>\n{table(('reason for BF16', 'count', 'layers'), rows)}{zero if uncalibrated else ''}"
    )


def tensor_provenance(report: Mapping[str, Any]) -> str:
    tensors = table(("tensor", "provenance"), report["tensor_provenance"].items())
    reasons = "; ".join(f"{count} {reason}" for reason, count in report["dropped_tensors"].items())
    dropped = f"<p>Dropped from the source: {text(reasons)}.</p>\n"
    return (
        "<h2>Tensor provenance</h2>\n<p>Carried tensors are bit-identical to the source, derived tensors are computed "
        "from it, and new tensors are initialized.</p>\n"
        f"{table(('provenance', 'tensors'), report['tensor_counts'].items())}{dropped if reasons else ''}"
        f"<details><summary>All {len(report['tensor_provenance'])} tensors</summary>\n{tensors}</details>\n"
    )
