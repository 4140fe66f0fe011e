"""The convert job: a checkpoint into FP8, as `python -m conversion.to_fp8` does it, tracked."""

from pathlib import Path
from typing import Any

from jobs.state.journal import Journal


def run(run_folder: str, *, source: str, output: str, options: dict[str, Any]) -> str:
    """Returns the converted checkpoint's directory; `options` are those of `conversion.options.Options`.

    Raises ValueError where the conversion does not pass its own checks: it is written, and not for training.
    """
    from conversion.options import Options
    from conversion.report.text import PAGE, REPORT, describe
    from conversion.to_fp8 import convert

    report = convert(source, output, Options(**options))
    print(describe(report))
    journal = Journal(run_folder)
    losses = {name.replace(",", "").replace(" ", "_"): loss for name, loss in report["losses"].items()}
    journal.metrics(0, {f"conversion/loss_{name}": loss for name, loss in losses.items()})
    if report["gradient_cosine"] is not None:
        journal.metrics(0, {"conversion/gradient_cosine": report["gradient_cosine"]})
    for way, error in (report["reparameterization"] or {"mean_error": {}})["mean_error"].items():
        journal.metrics(0, {f"conversion/output_error_{way}": error})
    for name in (REPORT, PAGE):
        journal.artifact(Path(output) / name)
    journal.tags(
        {
            "pixart.source": source,
            "pixart.source_sha256": report["source_sha256"],
            "pixart.gate": "PASS" if report["gate"]["passed"] else "FAIL",
        }
    )
    if not report["gate"]["passed"]:
        failed = [check for check in report["gate"]["checks"] if not check["passed"]]
        what = "; ".join(f"{check['name']} {check['value']}, limit {check['limit']}" for check in failed)
        raise ValueError(f"the conversion does not pass: {what} (see {Path(output) / PAGE})")
    return output
