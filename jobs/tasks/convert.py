"""The convert job: convert a checkpoint to FP8 as `python -m conversion.to_fp8` does, with tracking."""

from pathlib import Path
from typing import Any

from jobs.state.journal import Journal


def run(run_folder: str, *, source: str, output: str, options: dict[str, Any]) -> str:
    """Convert a checkpoint and return the output directory; `options` holds the fields of `conversion.options.Options`.

    Raises ValueError if the conversion fails its acceptance checks; the checkpoint is written, but not for training.
    """
    from conversion.convert import convert
    from conversion.options import from_record
    from conversion.report.text import PAGE, REPORT, describe

    report = convert(source, output, from_record(options))
    print(describe(report))
    journal = Journal(run_folder)
    losses = {name.replace(",", "").replace(" ", "_"): loss for name, loss in report["losses"].items()}
    journal.metrics(0, {f"conversion/loss_{name}": loss for name, loss in losses.items()})
    if report["gradient_cosine_similarity"] is not None:
        journal.metrics(0, {"conversion/gradient_cosine_similarity": report["gradient_cosine_similarity"]})
    for strategy, error in (report["reparameterization"] or {"mean_error": {}})["mean_error"].items():
        journal.metrics(0, {f"conversion/output_error_{strategy}": error})
    for name in (REPORT, PAGE):
        journal.artifact(Path(output) / name)
    journal.tags(
        {
            "pixart.source": source,
            "pixart.source_sha256": report["source_sha256"],
            "pixart.acceptance": "PASS" if report["acceptance"]["passed"] else "FAIL",
        }
    )
    if not report["acceptance"]["passed"]:
        failed = [check for check in report["acceptance"]["checks"] if not check["passed"]]
        failures = "; ".join(f"{check['name']} {check['value']}, limit {check['limit']}" for check in failed)
        raise ValueError(f"the conversion failed its acceptance checks: {failures} (see {Path(output) / PAGE})")
    return output
