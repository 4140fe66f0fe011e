"""What a conversion can be told, on its own command line and on the launcher's. Imports nothing heavy."""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

Way = Literal["paper", "fitted", "distilled"]
Recipe = Literal["delayed", "current", "rowwise", "mxfp8"]
Statistic = Literal["max", "percentile", "mse"]
Export = Literal["transformer-engine", "torchao", "inference"]
Device = Literal["auto", "cpu", "cuda"]

STATEFUL: Recipe = "delayed"  # the recipe that keeps scales; all others measure them anew in every step
AUTO = "auto"
TEXT_DIM = 2048  # T5Gemma-XL, the text encoder of the real run
BASE_LATENT_SIZE = 32  # latent side of the original training, which its files do not say


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How to convert; the meaning of each is in the command line's help. Raises ValueError for a number too small."""

    stage: int = 2
    way: Way = "fitted"
    recipe: Recipe = STATEFUL
    keep_bf16: tuple[str, ...] = (AUTO,)
    data: str | None = None
    text_dim: int | None = None
    base_latent_size: int | None = None
    batches: int = 8
    batch: int = 16
    statistic: Statistic = "max"
    history: int = 16
    margin: int = 1
    exports: tuple[Export, ...] = ()
    device: Device = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        least = {"batches": 1, "batch": 1, "history": 2, "margin": 0, "text_dim": 1, "base_latent_size": 1}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {limit}")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def named(text: str) -> str:
    """Refuses the nothing that a variable which is not set leaves behind."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def check_apart(output: Path, source: Path) -> None:
    """Raises ValueError for an output that would replace its source."""
    if output.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{output} is or holds the source: name another --output")


def default_output(source: Path) -> Path:
    """Beside its source."""
    return source.with_name(f"{source.stem if source.is_file() else source.name}.fp8")


def add_options(parser: argparse.ArgumentParser) -> None:
    default = Options()
    parser.add_argument("--stage", type=int, choices=(1, 2), default=default.stage, help="1 keeps stage 1 (default: 2)")
    parser.add_argument(
        "--reparam", dest="way", choices=get_args(Way), default=default.way, help="stage 1 to 2 (default: fitted)"
    )
    parser.add_argument(
        "--recipe", choices=get_args(Recipe), default=default.recipe, help="of FP8 scaling (default: delayed)"
    )
    parser.add_argument(
        "--keep-bf16",
        action="append",
        metavar="AUTO|PATTERN",
        help="linears that stay in BF16, by name with * or, with auto, those that lose too much (default: auto)",
    )
    parser.add_argument(
        "--data", type=named, help="dataset to calibrate on (default: the checkpoint's own, else synthetic)"
    )
    parser.add_argument("--text-dim", type=int, help=f"width of text states (default: the dataset's, else {TEXT_DIM})")
    parser.add_argument(
        "--base-latent-size", type=int, help=f"latent side of a file's model (default: {BASE_LATENT_SIZE})"
    )
    parser.add_argument("--batches", type=int, default=default.batches, help="calibration batches (default: 8)")
    parser.add_argument("--batch", type=int, default=default.batch, help="images in each (default: 16)")
    parser.add_argument(
        "--statistic", choices=get_args(Statistic), default=default.statistic, help="for amax (default: max)"
    )
    parser.add_argument("--history", type=int, default=default.history, help="rows of amax history (default: 16)")
    parser.add_argument("--margin", type=int, default=default.margin, help="powers of two of headroom (default: 1)")
    parser.add_argument(
        "--export", dest="exports", action="append", choices=get_args(Export), help="also for others; repeatable"
    )
    parser.add_argument("--device", choices=get_args(Device), default=default.device, help="to measure on")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")


def from_arguments(parsed: argparse.Namespace) -> Options:
    """Raises ValueError as `Options` does."""
    given: dict[str, Any] = {field.name: getattr(parsed, field.name) for field in dataclasses.fields(Options)}
    given["keep_bf16"] = tuple(AUTO if word.lower() == AUTO else word for word in given["keep_bf16"] or [AUTO])
    return Options(**{**given, "exports": tuple(given["exports"] or ())})
