"""The convert job: a checkpoint into FP8, as `python -m conversion.to_fp8` does it, tracked."""

from pathlib import Path
from typing import Any

from jobs.tracking import Journal


def run(run_folder: str, *, source: str, output: str, options: dict[str, Any]) -> str:
    """Returns the converted checkpoint's directory; `options` are those of `conversion.to_fp8.convert`."""
    from conversion.to_fp8 import REPORT, convert, describe

    directory, report = convert(source, output, **options)
    print(describe(report, directory))
    journal = Journal(run_folder)
    losses = {
        f"conversion/loss_{name.replace(',', '').replace(' ', '_')}": loss for name, loss in report.losses.items()
    }
    journal.metrics(0, {**losses, "conversion/gradient_cosine": report.gradient_cosine})
    for way, errors in report.output_error.items():
        journal.metrics(0, {f"conversion/output_error_{way}": max(errors)})
    journal.artifact(Path(directory) / REPORT)
    journal.tags({"pixart.source": source, "pixart.source_sha256": report.source_sha256})
    return str(directory)
