"""Options of a conversion, for its command line and for the launcher's; this module imports nothing heavy."""

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

Strategy = Literal["paper", "fitted", "distilled"]
Recipe = Literal["delayed", "current", "rowwise", "mxfp8"]
Statistic = Literal["max", "percentile", "mse"]
Export = Literal["transformer-engine", "torchao", "inference"]
Device = Literal["auto", "cpu", "cuda"]

STATEFUL: Recipe = "delayed"  # the only recipe whose scales are state; the others compute scales in every step
AUTO = "auto"
TEXT_DIM = 2048  # hidden size of T5Gemma-XL, the text encoder of the `xl` recipe
BASE_LATENT_SIZE = 32  # latent side at 256 px with an 8x VAE; `.pt` files of the original training do not record it
# Names that these options had in the request of a run that an earlier version submitted.
EARLIER_NAMES = {
    "way": "reparameterization",
    "recipe": "fp8_recipe",
    "data": "calibration_dataset",
    "base_image_size": "base_latent_size",
    "batches": "num_batches",
    "batch": "batch_size",
    "statistic": "amax_statistic",
    "history": "amax_history_len",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Settings of a conversion; the help of each command-line option describes them.

    Raises ValueError if a number is below its minimum.
    """

    stage: int = 2
    reparameterization: Strategy = "fitted"
    fp8_recipe: Recipe = STATEFUL
    keep_bf16: tuple[str, ...] = (AUTO,)
    last_blocks_bf16: int = 0
    calibration_dataset: str | None = None
    text_dim: int | None = None
    base_latent_size: int | None = None
    num_batches: int = 8
    batch_size: int = 16
    amax_statistic: Statistic = "max"
    amax_history_len: int = 16
    margin: int = 1
    exports: tuple[Export, ...] = ()
    device: Device = "auto"
    ignore_unknown: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        minimums = {
            "num_batches": 1,
            "batch_size": 1,
            "amax_history_len": 2,
            "margin": 0,
            "last_blocks_bf16": 0,
            "text_dim": 1,
            "base_latent_size": 1,
        }
        for name, minimum in minimums.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")


class Parser(argparse.ArgumentParser):
    """Argument parser that reports an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def non_empty(text: str) -> str:
    """Parse an option's value; refuse the empty string that an unset shell variable expands to."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def check_exists(checkpoint: Path) -> None:
    """Raise ValueError if there is no file or directory of this name."""
    if not checkpoint.exists():
        raise ValueError(f"{checkpoint}: no such file or directory")


def check_output_apart(output: Path, source: Path) -> None:
    """Raise ValueError if writing `output` would replace `source`."""
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{output} is or holds the source; choose another --output")


def default_output(source: Path) -> Path:
    """Return the default output directory: the source's name with the suffix .fp8, in the same folder."""
    return source.with_name(f"{source.stem if source.is_file() else source.name}.fp8")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add an option to `parser` for every field of `Options`."""
    default = Options()
    parser.add_argument(
        "--stage",
        type=int,
        choices=(1, 2),
        default=default.stage,
        help="Stage of the result; 1 keeps a stage-1 model as stage 1 (default: %(default)s).",
    )
    parser.add_argument(
        "--reparameterization",
        choices=get_args(Strategy),
        default=default.reparameterization,
        help="Strategy that replaces the modulation of each block by the shared one of stage 2: paper (PixArt-alpha, "
        "one t), fitted (least squares over t) or distilled (fitted, then trained) (default: %(default)s).",
    )
    parser.add_argument(
        "--fp8-recipe",
        choices=get_args(Recipe),
        default=default.fp8_recipe,
        help="FP8 scaling recipe; only delayed stores scales in the checkpoint (default: %(default)s).",
    )
    parser.add_argument(
        "--keep-bf16",
        action="append",
        metavar="PATTERN",
        help="Linears to keep in BF16, as a name with wildcards; auto keeps those that are measured to lose too much "
        "accuracy in FP8; repeatable (default: auto).",
    )
    parser.add_argument(
        "--last-blocks-bf16",
        type=int,
        default=default.last_blocks_bf16,
        metavar="N",
        help="Number of blocks at the end of the model whose linears stay in BF16 (default: %(default)s).",
    )
    parser.add_argument(
        "--dataset",
        dest="calibration_dataset",
        type=non_empty,
        metavar="DIRECTORY",
        help="Dataset to calibrate on (default: the dataset that the checkpoint was trained on, else synthetic data).",
    )
    parser.add_argument(
        "--text-dim",
        type=int,
        metavar="DIM",
        help=f"Width of the text encoder's hidden states (default: the dataset's, else {TEXT_DIM}).",
    )
    parser.add_argument(
        "--base-latent-size",
        type=int,
        metavar="SIDE",
        help="Latent side that the model was first trained at, for files that do not record it "
        f"(default: {BASE_LATENT_SIZE}).",
    )
    parser.add_argument(
        "--num-batches",
        type=int,
        default=default.num_batches,
        metavar="N",
        help="Number of calibration batches (default: %(default)s).",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=default.batch_size,
        metavar="N",
        help="Number of images in each calibration batch (default: %(default)s).",
    )
    parser.add_argument(
        "--amax-statistic",
        choices=get_args(Statistic),
        default=default.amax_statistic,
        help="Statistic of a tensor's magnitudes that is taken as its amax: their maximum, the percentile 99.99, or "
        "the clipping with the smallest mean squared error (default: %(default)s).",
    )
    parser.add_argument(
        "--amax-history-len",
        type=int,
        default=default.amax_history_len,
        metavar="ROWS",
        help="Number of rows of the amax history (default: %(default)s).",
    )
    parser.add_argument(
        "--margin",
        type=int,
        default=default.margin,
        metavar="POWER",
        help="Headroom of the scales, in powers of two (default: %(default)s).",
    )
    parser.add_argument(
        "--export",
        dest="exports",
        action="append",
        choices=get_args(Export),
        metavar="FORMAT",
        help=f"Also write the result for another library: {', '.join(get_args(Export))}; repeatable.",
    )
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default=default.device,
        help="Device that runs the fit, calibration and verification; auto is cuda where there is one "
        "(default: %(default)s).",
    )
    parser.add_argument(
        "--ignore-unknown",
        action="store_true",
        help="Read a checkpoint without the parts of it that look like training state and are not understood.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the output of an earlier conversion.")


def from_arguments(parsed: argparse.Namespace) -> Options:
    """Build `Options` from the arguments that `add_options` parses. Raises ValueError as `Options` does."""
    values: dict[str, Any] = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Options)}
    values["keep_bf16"] = tuple(AUTO if word.lower() == AUTO else word for word in values["keep_bf16"] or [AUTO])
    return Options(**{**values, "exports": tuple(values["exports"] or ())})


def from_record(record: Mapping[str, Any]) -> Options:
    """Build `Options` from a run's request, which may have been written by an earlier version."""
    return Options(**{EARLIER_NAMES.get(name, name): value for name, value in record.items()})
