"""Typed options of the commands: how a field is declared, and the groups of options that several commands share.

A command's options are a frozen dataclass. `option` or `argument` declares how a field is written on the command line,
and the annotation of the field is the type of its value. `jobs.commands.parsing` builds the argparse parser from them;
no other module uses argparse.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

if TYPE_CHECKING:
    from pixart.config.keys.toml_file import RunFile

METADATA = "command line"
DATASET_KEY = "data.path="
REPORTS = ("wandb",)  # trackers beside MLflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Declaration of one field: an option with `flags`, or a positional argument without flags."""

    flags: tuple[str, ...]
    help: str
    metavar: str | None
    convert: Callable[[str], Any] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Delegated:
    """Declaration of a field whose options another package adds to the parser and reads from the namespace."""

    add: Callable[[Any], None]
    read: Callable[[Any], Any]


def option(
    *flags: str, help: str, metavar: str | None = None, default: Any = None, convert: Callable[[str], Any] | None = None
) -> Any:
    """Declare an option. `convert` converts the text of one value, and raises ValueError for an invalid one."""
    return field(default=default, metadata={METADATA: Option(flags=flags, help=help, metavar=metavar, convert=convert)})


def argument(metavar: str, *, help: str, convert: Callable[[str], Any] | None = None) -> Any:
    """Declare a positional argument: required if the field is a `str`, optional if it is a `str | None`."""
    return field(metadata={METADATA: Option(flags=(), help=help, metavar=metavar, convert=convert)})


def delegated(add: Callable[[Any], None], read: Callable[[Any], Any]) -> dict[str, Any]:
    """Return the metadata of a field that holds the options of another package."""
    return {METADATA: Delegated(add=add, read=read)}


def nonempty(text: str) -> str:
    """Return `text`. Raises ValueError if it is empty, as after the expansion of an unset shell variable."""
    if not text.strip():
        raise ValueError("is empty; give a value, or leave the option out")
    return text


def positive(text: str) -> int:
    """Return the number that `text` holds. Raises ValueError unless it is an integer of at least 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ValueError(f"{text!r} is not a positive integer")
    return int(text)


def check_report(name: str | None) -> None:
    """Raise ValueError unless a tracker beside MLflow is known and its package is installed."""
    if name and name not in REPORTS:
        raise ValueError(f"--report {name}: is not known; it must be {' or '.join(REPORTS)}")
    if name and find_spec(name) is None:
        raise ValueError(f"--report {name}: its package is not installed; install the extra {name}")


def non_negative(text: str) -> float:
    """Return the number that `text` holds. Raises ValueError unless it is finite and at least 0."""
    value = to_number(text)
    if not 0 <= value < math.inf:
        raise ValueError(f"{text!r} is not a number of at least 0")
    return value


def fraction(text: str) -> float:
    """Return the number that `text` holds. Raises ValueError unless it is above 0 and at most 1."""
    value = to_number(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} must be a number above 0 and at most 1")
    return value


def to_number(text: str) -> float:
    """Return the number that `text` holds; not a number for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """The options of every command."""

    TITLE: ClassVar[str] = "common options"

    home: str | None = option(
        "--home", metavar="FOLDER", help="Folder of datasets, runs and tracking (default: $PIXART_HOME, else outputs)."
    )
    config: str | None = option(
        "--config",
        metavar="FILE",
        help="TOML file with home, recipe, dataset, cluster and configuration keys; options of the command line win "
        "(default: no file).",
    )

    typed: Any = field(default=None, metadata={METADATA: None})  # the options without the values of --config, if given

    def with_run_file(self, file: "RunFile") -> Self:
        """Return the options with the values of a configuration file for those missing from the command line."""
        return replace(self, home=self.home or file.home, typed=self)


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(CommonOptions):
    """The options of a command that works with a recipe and its dataset."""

    TITLE: ClassVar[str] = "recipe"

    recipe: str | None = option(
        "--recipe", metavar="NAME", help="Recipe to start from: demo, xl or xl-mxfp8 (default: demo)."
    )
    overrides: tuple[str, ...] = option(
        "--set",
        default=(),
        metavar="KEY=VALUE",
        help="Set a configuration key, such as stage1.steps=100 or data.source=s3://bucket/photos; repeatable "
        "(default: the recipe's values). `python -m jobs.launch config` lists every key.",
    )
    dataset: str | None = option(
        "--dataset", metavar="FOLDER", help="Folder or URL of the dataset (default: the recipe's data.path)."
    )

    @property
    def names_dataset(self) -> bool:
        """Whether the options name a dataset, by --dataset or by its key."""
        return bool(self.dataset) or any(item.startswith(DATASET_KEY) for item in self.overrides)

    def with_run_file(self, file: "RunFile") -> Self:
        return replace(
            super().with_run_file(file),
            recipe=self.recipe or file.recipe,
            overrides=(*file.overrides, *self.overrides),  # the last value of a key takes effect
            dataset=self.dataset if self.names_dataset else file.dataset,
        )


@dataclass(frozen=True, kw_only=True)
class SubmissionOptions(CommonOptions):
    """The options of a command that submits jobs."""

    TITLE: ClassVar[str] = "submission"

    cluster: str | None = option(
        "--cluster",
        metavar="PROFILE",
        help="Cluster profile by name or path (default: $PIXART_CLUSTER, else local where there is no Slurm).",
    )
    gpus_per_node: int | None = option(
        "--gpus-per-node",
        metavar="N",
        convert=positive,
        help="Number of ranks per node of a training job (default: from the profile).",
    )
    wait: bool = option(
        "--wait",
        default=False,
        help="Wait for the end of the jobs on a cluster, with a progress line (default: return after submission).",
    )
    report: str | None = option(
        "--report",
        metavar="NAME",
        help="Tracker beside MLflow that shows the runs: wandb (default: MLflow alone).",
    )
    dry_run: bool = option(
        "--dry-run",
        default=False,
        help="Print what would be submitted, and submit nothing (default: submit).",
    )

    def with_run_file(self, file: "RunFile") -> Self:
        return replace(super().with_run_file(file), cluster=self.cluster or file.cluster)


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommonOptions):
    """The options of a command about one run."""

    run: str | None = argument("RUN", help="Folder, name or part of the name of a run (default: the newest run).")


OptionsT = TypeVar("OptionsT", bound=CommonOptions)


@dataclass(frozen=True, slots=True)
class Command(Generic[OptionsT]):
    """A command: the type of its options, and the function that runs it and returns the exit code."""

    options: type[OptionsT]
    run: Callable[[OptionsT], int]
