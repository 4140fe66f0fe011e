"""Convert a checkpoint to FP8, and from stage 1 to stage 2.

Submits `python -m conversion.to_fp8` as a job, with the same options.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from conversion.options import Options as ConversionOptions
from conversion.options import add_options, default_output, from_arguments
from conversion.reading import orbax_metadata
from conversion.report.text import PAGE, training_words
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching
from jobs.commands.options import Command, SubmissionOptions, argument, delegated, option
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import check_file, check_lengths, checkpoint_record, find_checkpoint, is_foreign
from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.submit import run_ranks
from pixart.config.keys.toml_file import RunFile
from pixart.recipes import DEFAULT_RECIPE, RECIPES
from slurm.executor import Cluster


@dataclass(frozen=True, kw_only=True)
class Options(SubmissionOptions):
    """The options of `convert`."""

    checkpoint: str = argument("CHECKPOINT", help="Checkpoint directory, run folder, .pt file or folder of Orbax.")
    output: str | None = option(
        "--output", metavar="FOLDER", help="Folder to write (default: CHECKPOINT.fp8, beside the checkpoint)."
    )
    conversion: ConversionOptions = field(metadata=delegated(add_options, from_arguments))

    def with_run_file(self, file: RunFile) -> Self:
        """Return the options with the cluster and the calibration dataset of a configuration file."""
        calibration = replace(self.conversion, calibration_dataset=self.conversion.calibration_dataset or file.dataset)
        return replace(super().with_run_file(file), conversion=calibration)


def run(options: Options) -> int:
    home = runs.home(options.home)
    with launching("convert", options, home, RECIPES[DEFAULT_RECIPE](str(home))) as launch:
        print(convert(launch, options))
    return 0


def convert(launch: Launch, options: Options) -> str:
    """Check the checkpoint and the output, and submit the conversion."""
    source = Path(options.checkpoint).absolute()
    if not source.is_file() and not source.is_dir():
        raise ValueError(f"checkpoint {options.checkpoint}: no such file or directory")
    if source.is_dir():
        source = orbax_metadata.find(source) or (source if is_foreign(source) else find_checkpoint(str(source)))
    target = Path(options.output).absolute() if options.output else default_output(source)
    check_source(source, options.conversion)
    if target.exists() and not options.conversion.overwrite:
        raise ValueError(f"{target} exists; give another --output, or --overwrite")
    submitted = submit_conversion(launch, source, target, options.conversion)
    if not launch.wait:
        return describe_submission(options, submitted)
    record = checkpoint_record(target)
    decay_qk_norm = record["provenance"].get("decay_qk_norm", False)
    words = training_words(options.conversion, target, record["dataset"], decay_qk_norm=decay_qk_norm)
    return f"converted: {target}\nreport: {target}/{PAGE}\nnext: {next_command(options, 'train', *words)}"


def check_source(source: Path, options: ConversionOptions) -> None:
    """Check the checkpoint and the calibration dataset as far as that needs no torch. Raises ValueError."""
    if source.is_file():
        check_file(source)
    elif is_foreign(source):
        check_lengths(source)
    else:
        record = checkpoint_record(source)
        if record["plan"]:
            raise ValueError(f"{source} is already an FP8 checkpoint; give the BF16 checkpoint")
        if record["stage"] > options.stage:
            raise ValueError(f"--stage {options.stage}: {source} is already a stage-{record['stage']} checkpoint")
    dataset = options.calibration_dataset
    if dataset and ledger.manifest(dataset) is None:
        raise ValueError(f"--dataset {dataset}: is not a dataset; run 'caption' and 'latents' to create it")


def submit_conversion(
    launch: Launch, source: Path, target: Path, options: ConversionOptions, after: Sequence[str] = ()
) -> Run:
    """Submit the conversion; it overwrites the output, so that a retry can replace what an interrupted job left."""
    values = {**asdict(options), "overwrite": True}
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("convert", 1, 1),
        {"source": str(source), "output": str(target), "options": values},
        parameters={"source": str(source), **values},
        tags={"pixart.parent_checkpoint": str(source)},
        total=1,
        after=after,
    )


COMMAND = Command(Options, run)
