"""Compare two evaluations, image by image.

Images of the same prompt and noise are pairs. An evaluation with several checkpoints or settings is given as
EVALUATION#N, with N counted from 1 (default: its last one). Figures of different protocols are refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.commands.options import Command, CommonOptions, argument
from jobs.commands.results.evaluation_inputs import read_results
from jobs.state import evaluation
from jobs.state import run as runs
from pixart import records
from pixart.evaluation.protocol import differences
from pixart.terminal import printable

# Fields of a protocol that a comparison may be about; the noise and the prompts must be the same.
FREE = ("hash", "steps", "guidance", "weights")
ACROSS_CHECKPOINTS = ("hash",)


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `compare`."""

    first: str = argument("EVALUATION", help="Evaluation by folder, name or part of the name, as the baseline.")
    second: str = argument("OTHER", help="Evaluation that is compared with it.")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One variant of an evaluation."""

    folder: Path
    index: int
    variant: dict[str, Any]

    def scores(self) -> dict[str, dict[str, float]]:
        """Return the scores of the images, by figure and row."""
        return records.read(evaluation.variant_folder(self.folder, self.index) / "scores.json", evaluation.Scores)


def run(options: Options) -> int:
    home = runs.home(options.home)
    print(compare(find(home, options.first), find(home, options.second)))
    return 0


def find(home: Path, name: str) -> Subject:
    """Return a variant by the name of its evaluation and its number. Raises ValueError unless one matches."""
    words, _, number = name.partition("#")
    known = evaluation.folders(home)
    path = Path(words).absolute()
    matches = [path] if (path / evaluation.REQUEST).is_file() else [one for one in known if words in one.name]
    if len(matches) != 1:
        raise ValueError(
            f"evaluation {words!r}: {len(matches) or 'no'} evaluations in {home} match; give a part of exactly one name"
        )
    variants = read_results(matches[0])["variants"]
    if number and not (number.isdecimal() and 1 <= int(number) <= len(variants)):
        raise ValueError(
            f"evaluation {name!r}: it has {len(variants)} variants; give a number from 1 to {len(variants)}"
        )
    index = int(number) - 1 if number else len(variants) - 1
    return Subject(folder=matches[0], index=index, variant=variants[index])


def check_protocols(first: Subject, second: Subject) -> None:
    """Raise ValueError if the stages or the protocols differ, apart from the settings of the same checkpoint."""
    if first.variant["stage"] != second.variant["stage"]:
        raise ValueError(
            f"{second.folder}: is of stage {second.variant['stage']}, and {first.folder} of stage "
            f"{first.variant['stage']}; compare evaluations of one stage"
        )
    is_same = first.variant["checkpoint"] == second.variant["checkpoint"]
    ignored = FREE if is_same else ACROSS_CHECKPOINTS
    protocols = [
        {key: value for key, value in one.variant["protocol"].items() if key not in ignored} for one in (first, second)
    ]
    if different := differences(*protocols):
        raise ValueError(
            f"{second.folder}: has another protocol than {first.folder}: {', '.join(different)}; "
            "evaluate both by the same"
        )


def compare(first: Subject, second: Subject) -> str:
    """Return the figures of both, and of paired scores the mean difference with its interval and the sign test."""
    check_protocols(first, second)
    lines = [f"{label}: {describe(one)}" for label, one in (("first", first), ("second", second))]
    figures = [one.variant["figures"] for one in (first, second)]
    repeats = read_results(first.folder)["request"]["settings"]["images_per_prompt"]
    scores = [one.scores() for one in (first, second)]
    for name in sorted((figures[0].keys() & figures[1].keys()) - scores[0].keys()):
        low, high = (interval(one[name]) for one in figures)
        lines.append(f"{name}: {low}, then {high}; {verdict(figures[0][name], figures[1][name])}")
    for name in sorted(scores[0].keys() & scores[1].keys()):
        lines.append(f"{name}: {paired(scores[0][name], scores[1][name], repeats)}")
    return "\n".join(map(printable, lines))


def describe(subject: Subject) -> str:
    variant = subject.variant
    return (
        f"step {variant['step']}, {variant['weights']}, {variant['steps']} steps, guidance {variant['guidance']:g}, "
        f"{variant['checkpoint']}"
    )


def interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"


def verdict(first: dict[str, float], second: dict[str, float]) -> str:
    """Return whether the intervals of two unpaired figures overlap."""
    overlap = first["low"] <= second["high"] and second["low"] <= first["high"]
    return "the intervals overlap" if overlap else "the intervals do not overlap"


def paired(first: dict[str, float], second: dict[str, float], repeats: int) -> str:
    """Return the comparison of the scores of images with the same prompt and noise."""
    import numpy as np

    from pixart.evaluation.intervals import bootstrap_mean, sign_test

    rows = sorted(first.keys() & second.keys(), key=int)
    before, after = ([scores[row] for row in rows] for scores in (first, second))
    groups = np.array([int(row) // repeats for row in rows])
    difference = bootstrap_mean(np.subtract(after, before), groups, replicates=1000)
    test = sign_test(before, after)
    return (
        f"{np.mean(before):.4g}, then {np.mean(after):.4g}; difference {difference.value:+.4g} "
        f"({difference.low:+.4g} to {difference.high:+.4g}) over {len(rows)} images; higher in {test.higher}, lower in "
        f"{test.lower}, equal in {test.ties}; sign test p={test.p_value:.3g}"
    )


COMMAND = Command(Options, run)
