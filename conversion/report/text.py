"""The report of a conversion as text for a terminal; `html` renders it as HTML, and report.json holds the data."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversion.options import STATEFUL, Options
from pixart.terminal import printable

REPORT = "report.json"
PAGE = "report.html"
PLACEHOLDER = "DATASET"  # in a command, for the user's dataset
SYNTHETIC = "synthetic"  # prefix of the report's calibration data if no dataset was used
UNTRAINED_GUIDANCE = (
    "The source was trained without dropping conditions, so guidance against the empty text is untrained; sample with "
    "guidance 1, or continue training with stage2.cond_dropout_prob > 0."
)
DECAYED_QK_NORM = (
    "The source was trained with weight decay of the norms of queries and keys; decay_qk_norm=true continues with it."
)
T_COLUMNS = (1, 3, 5, 6, 7, 9, 11)  # indices of the report's values of t that are shown


def describe(report: Mapping[str, Any]) -> str:
    """Render the report of `convert` as lines of text."""
    sizes = ", ".join(f"{key} {value}" for key, value in report["config"].items() if value is not None)
    origin = "inferred from shapes" if report["config_inferred"] else "stored in the source"
    counts = ", ".join(f"{count} {kind}" for kind, count in report["tensor_counts"].items() if count)
    lines = [
        f"read        {report['source']}",
        f"            {report['source_format']}, stage {report['stages'][0]}, step {report['step']}",
        f"model       stage {report['stages'][1]}: {sizes} (configuration {origin})",
        f"data        {report['calibration_data']}",
        f"latents     {', '.join(f'{height} x {width}' for height, width in report['calibration_latents'])}",
        f"tensors     {counts}",
    ]
    lines += describe_source(report)
    if report["calibration_data"].startswith(SYNTHETIC):
        lines.append(
            "WARNING     scales were calibrated on synthetic data; give --dataset to calibrate on the training data"
        )
    if errors := report["reparameterization"]:
        lines += describe_strategies(errors)
    reasons = Counter(reason.partition(":")[0] for reason in report["kept_in_bf16"].values())
    kept = "; ".join(f"{count} ({reason})" for reason, count in reasons.items())
    lines.append(
        f"FP8         {report['num_fp8_linears']} linears, {report['fp8_recipe']} scaling; kept in BF16: {kept}"
    )
    if report["fp8_recipe"] != STATEFUL:
        lines.append("scales      none stored: this recipe computes scales in every step")
    if report["uncalibrated"]:
        lines.append(
            f"scales      {len(report['uncalibrated'])} tensors were zero in every batch; delayed scaling sets their "
            "scales in training"
        )
    lines += describe_layers(report["layers"])
    lines += [f"loss        {loss:.5f}  {name}" for name, loss in report["losses"].items()]
    if report["gradient_cosine_similarity"] is not None:
        cosine = report["gradient_cosine_similarity"]
        lines.append(f"gradient    cosine similarity of FP8 and BF16 weight gradients, first step: {cosine:.4f}")
    for check in report["acceptance"]["checks"]:
        verdict = "PASS" if check["passed"] else "FAIL"
        lines.append(f"{verdict}        {check['name']}: {check['value']} (limit {check['limit']})")
    lines.append(f"written     {report['output']}, with {PAGE}")
    if report["acceptance"]["passed"]:
        lines.append(f"next        {report['next_command']}")
    else:
        lines.append("next        read the report; train accepts this checkpoint only with --accept-failed-conversion")
    return "\n".join(map(printable, lines))


def describe_source(report: Mapping[str, Any]) -> list[str]:
    """Render what was skipped in the source, and what training must know about it, as lines of text."""
    lines = [f"dropped     {count} {reason}" for reason, count in report["dropped_tensors"].items()]
    if report["skipped_extra_states"]:
        lines.append(f"skipped     {describe_extra_states(report['skipped_extra_states'])}")
    if report["unused_entries"]:
        lines.append(f"unused      {describe_unused_entries(report['unused_entries'])}")
    if report["decay_qk_norm"]:
        lines.append(f"optimizer   {DECAYED_QK_NORM}")
    if is_guidance_untrained(report):
        lines.append(f"guidance    {UNTRAINED_GUIDANCE}")
    return lines


def describe_extra_states(counts: Mapping[str, int]) -> str:
    """Return a text about the extra states that were skipped, whose number is given by state dictionary."""
    numbers = " and ".join(f"{count} in {name}" for name, count in counts.items())
    return f"_extra_state entries of TransformerEngine, which hold no parameters and are never unpickled: {numbers}"


def describe_unused_entries(unused: Mapping[str, Any]) -> str:
    """Return a text about the entries of the source that are not part of the training state: names and their number."""
    names, count = unused["names"], unused["count"]
    more = f" and {count - len(names)} more" if count > len(names) else ""
    return f"{count} {'entry' if count == 1 else 'entries'} of the source: {', '.join(names)}{more}"


def is_guidance_untrained(report: Mapping[str, Any]) -> bool:
    """Return whether the result is a stage-2 model that is known to have never been trained on the null condition."""
    return report["stages"][1] == 2 and report["cond_dropout_prob"] == 0


def training_words(
    options: Options, output: str | Path, dataset: str | None, *, decay_qk_norm: bool = False
) -> list[str]:
    """Return the options of `jobs.launch train` that train a converted checkpoint in FP8.

    `dataset` is the dataset that the checkpoint was trained on; without one, it is the dataset of the calibration,
    else a placeholder. `decay_qk_norm` is whether the source was trained with weight decay of the norms of queries and
    keys. Stage 1 trains in BF16 by default.
    """
    words = ["--stage", str(options.stage), "--from", str(output)]
    if options.calibration_dataset or not dataset:
        words += ["--dataset", options.calibration_dataset or PLACEHOLDER]
    settings = ["stage1.fp8=true"] * (options.stage == 1) + [f"stage{options.stage}.decay_qk_norm=true"] * decay_qk_norm
    return [*words, *(word for setting in settings for word in ("--set", setting))]


def next_command(options: Options, output: str | Path, dataset: str | None, *, decay_qk_norm: bool = False) -> str:
    """Return the command that trains a converted checkpoint; the checkpoint's run, if any, has the recipe.

    The run's home folder is named if it is not the default.
    """
    words = training_words(options, output, dataset, decay_qk_norm=decay_qk_norm)
    run = Path(output).absolute().parent.parent  # of RUN/checkpoints/step-00000100.fp8
    if run.parent.name == "runs" and (run / "config.json").exists():
        home = run.parent.parent
        if home != Path(os.environ.get("PIXART_HOME") or "outputs").absolute():
            words += ["--home", str(home)]
    return shlex.join(["python", "-m", "jobs.launch", "train", *words])


def describe_strategies(errors: Mapping[str, Any]) -> list[str]:
    """Render the relative errors of each re-parameterization strategy at some t, on average, and of samples."""
    columns = [index for index in T_COLUMNS if index < len(errors["t"])]
    head = " ".join(f"{errors['t'][index]:>8.2f}" for index in columns)
    lines = [
        "Relative RMS error of each strategy against stage 1 with the null class, by t",
        f"  t         {head}     mean  samples",
    ]
    for strategy, curve in errors["output_error"].items():
        row = " ".join(f"{curve[index]:>8.2%}" for index in columns)
        mark = "  <- written" if strategy == errors["strategy"] else ""
        mean, sample = errors["mean_error"][strategy], errors["sample_error"][strategy]
        lines.append(f"  {strategy:<9} {row} {mean:>8.2%} {sample:>8.2%}{mark}")
    return lines


def describe_layers(layers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Render the lowest SQNR over the blocks for each kind of linear."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        kinds.setdefault(".".join(layer["name"].split(".")[2:]), []).append(layer)
    if not kinds:
        return []
    columns = ("input", "weight", "output", "grad_weight")
    head = "".join(f"{name:>12}" for name in columns)
    lines = [f"{'Lowest SQNR over blocks, dB':<32}{head}  grad_weight (dynamic)"]
    for kind, group in kinds.items():
        cells = [lowest(layer["sqnr_db"][name] for layer in group) for name in columns]
        dynamic = lowest(layer["dynamic_sqnr_db"]["grad_weight"] for layer in group)
        lines.append(f"  {kind:<30}" + "".join(f"{cell:>12}" for cell in cells) + f"{dynamic:>23}")
    return lines


def lowest(values: Iterable[float | None]) -> str:
    """Format the smallest value with one decimal, or "-" if every value is None."""
    present = [value for value in values if value is not None]
    return f"{min(present):.1f}" if present else "-"
