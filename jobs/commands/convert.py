"""The command that converts a checkpoint: what is refused before the job is submitted, and the job."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from conversion.options import Options, default_output, from_arguments
from conversion.report.text import PAGE, next_command
from jobs.state import ledger
from jobs.state.checkpoint_names import check_file, check_lengths, checkpoint_record, find_checkpoint, is_foreign
from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.submit import describe_submission, run_ranks
from slurm.executor import Cluster


def convert_command(launch: Launch, options: argparse.Namespace) -> str:
    source = Path(options.checkpoint).absolute()
    if not source.is_file() and not source.is_dir():
        raise ValueError(f"checkpoint {options.checkpoint}: no such file or directory")
    if source.is_dir() and not is_foreign(source):
        source = find_checkpoint(str(source))
    target = Path(options.output).absolute() if options.output else default_output(source)
    how = from_arguments(options)
    check_source(source, how)
    if target.exists() and not how.overwrite:
        raise ValueError(f"{target} exists; choose another --output, or give --overwrite")
    run = submit_conversion(launch, source, target, how)
    if not launch.wait:
        return describe_submission(run)
    return f"converted: {target}\nreport: {target}/{PAGE}\nnext: {next_command(how.stage, target)}"


def check_source(source: Path, how: Options) -> None:
    """What can be said of a checkpoint, and of the data to calibrate on, without torch."""
    if source.is_file():
        check_file(source)
    elif is_foreign(source):
        check_lengths(source)
    else:
        record = checkpoint_record(source)
        if record["plan"]:
            raise ValueError(f"{source} is already an FP8 checkpoint; conversion starts from a BF16 checkpoint")
        if record["stage"] > how.stage:
            raise ValueError(f"--stage {how.stage}: {source} is already a stage-{record['stage']} checkpoint")
    dataset = how.calibration_dataset
    if dataset and ledger.manifest(dataset) is None:
        raise ValueError(f"--dataset {dataset}: not a dataset; run 'caption' and 'latents' to create it")


def submit_conversion(launch: Launch, source: Path, target: Path, how: Options, after: Sequence[str] = ()) -> Run:
    """The job replaces what it finds: it may be run again where it was cut short."""
    options = {**asdict(how), "overwrite": True}
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("convert", 1, 1),
        {"source": str(source), "output": str(target), "options": options},
        parameters={"source": str(source), **options},
        tags={"pixart.parent_checkpoint": str(source)},
        total=1,
        after=after,
    )
