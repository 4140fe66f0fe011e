"""What a conversion did and measured, as lines for a terminal; `html` has it as HTML, report.json as data."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversion.options import STATEFUL

REPORT = "report.json"
PAGE = "report.html"
SHOWN_T = (1, 3, 5, 6, 7, 9, 11)  # of the report's values of t


def describe(report: Mapping[str, Any]) -> str:
    sizes = ", ".join(f"{key} {value}" for key, value in report["config"].items() if value is not None)
    origin = "inferred from shapes" if report["inferred"] else "its own"
    lines = [
        f"read        {report['source']}",
        f"            {report['source_format']}, stage {report['stages'][0]}, step {report['step']}",
        f"model       stage {report['stages'][1]}: {sizes} ({origin})",
        f"data        {report['data']}",
        "tensors     " + ", ".join(f"{count} {fate}" for fate, count in report["fates"].items() if count),
    ]
    if report["data"].startswith("synthetic"):
        lines.append(
            "WARNING     scales come from synthetic data: name the run's own dataset by --data for scales that fit it"
        )
    if ways := report["reparameterization"]:
        lines += describe_ways(ways)
    reasons = Counter(report["kept"].values())
    kept = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    lines.append(f"FP8         {report['linears']} linears by {report['recipe']} scaling; BF16: {kept}")
    if report["recipe"] != STATEFUL:
        lines.append("scales      none to keep: this recipe measures them anew in every step")
    if report["unmeasured"]:
        zero = len(report["unmeasured"])
        lines.append(f"no scale    {zero} gradients are zero until the text is used; their scales follow in training")
    lines += describe_layers(report["layers"])
    lines += [f"loss        {loss:.5f}  {name}" for name, loss in report["losses"].items()]
    if report["gradient_cosine"] is not None:
        lines.append(f"gradient    cosine {report['gradient_cosine']:.4f} of FP8 against BF16, first step")
    for check in report["gate"]["checks"]:
        word = "pass" if check["passed"] else "FAIL"
        lines.append(f"{word}        {check['name']}: {check['value']} (limit {check['limit']})")
    lines.append(f"written     {report['output']}, with {PAGE}")
    if report["gate"]["passed"]:
        lines.append(f"next        {following(report['stages'][1], report['output'])}")
    else:
        lines.append("next        see what failed: train takes this checkpoint with --accept-failed-conversion only")
    return "\n".join(lines)


def following(stage: int, output: str | Path) -> str:
    """The command that goes on in FP8; stage 1 is trained in BF16 unless told."""
    command = f"python -m jobs.launch train --stage {stage} --from {output}"
    return f"{command} --set stage1.fp8=true" if stage == 1 else command


def describe_ways(ways: Mapping[str, Any]) -> list[str]:
    shown = [index for index in SHOWN_T if index < len(ways["t"])]
    head = " ".join(f"{ways['t'][index]:>8.2f}" for index in shown)
    lines = [f"error at t  {head}     mean  samples   (relative, against stage 1 without a class)"]
    for way, errors in ways["output_error"].items():
        row = " ".join(f"{errors[index]:>8.2%}" for index in shown)
        mark = "  <- written" if way == ways["way"] else ""
        lines.append(f"  {way:<9} {row} {ways['mean_error'][way]:>8.2%} {ways['sample_error'][way]:>8.2%}{mark}")
    return lines


def describe_layers(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """By kind of layer: the lowest SQNR over the blocks, and the least headroom."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(".".join(layer["name"].split(".")[2:]), []).append(layer)
    if not kinds:
        return []
    columns = ("input", "weight", "output", "weight_gradient")
    lines = [f"{'lowest SQNR, dB':<32}" + "".join(f"{name:>16}" for name in columns) + f"{'dynamic':>10}"]
    for kind, own in kinds.items():
        cells = [lowest(layer["sqnr"][name] for layer in own) for name in columns]
        dynamic = lowest(layer["dynamic"]["weight_gradient"] for layer in own)
        lines.append(f"  {kind:<30}" + "".join(f"{cell:>16}" for cell in cells) + f"{dynamic:>10}")
    return lines


def lowest(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{min(found):.1f}" if found else "-"
