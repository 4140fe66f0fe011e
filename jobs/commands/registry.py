"""The commands of the launcher, grouped by purpose.

A command's module is imported only when the command runs; the overview needs none of them.
"""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jobs.commands.options import Command

PROGRAM = "python -m jobs.launch"
MIN_BEGINNING = 4  # letters of a word that is taken for the beginning of another


@dataclass(frozen=True, slots=True)
class Entry:
    """The module of a command, and the summary, which is also the first line of the module's docstring."""

    module: str
    summary: str


GROUPS: dict[str, dict[str, Entry]] = {
    "Data": {
        "init": Entry("data.init", "Create a dataset: fix its source, shards, image size and models."),
        "adopt": Entry("data.adopt", "Make a dataset of latents and captions that are already computed."),
        "caption": Entry("data.caption", "Caption and screen the images of a dataset, one shard per array element."),
        "latents": Entry("data.latents", "Encode the images and captions of a dataset, one shard per array element."),
        "audit": Entry("data.audit", "Audit a dataset: report its statistics, and check them against limits."),
        "verify": Entry("data.verify", "Compare every file of a dataset with the checksums in its ledger."),
        "recaption": Entry(
            "data.recaption", "Rewrite prompts in the style of the captions, with the captioning model."
        ),
    },
    "Training": {
        "train": Entry("training.train", "Train stage 1 (class-conditional) or stage 2 (text-conditional)."),
        "convert": Entry("training.convert", "Convert a checkpoint to FP8, and from stage 1 to stage 2."),
        "pipeline": Entry("training.pipeline", "Submit every job from captions to samples, each after the one before."),
        "demo": Entry("training.demo", "Run the whole pipeline on rendered scenes, and wait for its samples."),
    },
    "Results": {
        "sample": Entry("results.sample", "Sample images from a checkpoint, or export a diffusers pipeline."),
        "evaluate": Entry(
            "results.evaluate",
            "Evaluate checkpoints by distances and prompt following, with intervals.",
        ),
        "compare": Entry("results.compare", "Compare two evaluations, image by image."),
        "serve": Entry(
            "results.serve", "Serve a checkpoint: OpenAI's images API and a page, on this machine or as a Slurm job."
        ),
        "open": Entry(
            "results.open",
            "Show the page of a run, compare training runs, or browse the captions of a dataset.",
        ),
        "lineage": Entry("results.lineage", "Show what a run, an image, a checkpoint or a dataset was made from."),
        "release": Entry("results.release", "Register the EMA weights of a checkpoint as a model version in MLflow."),
    },
    "Runs": {
        "runs": Entry("runs.runs", "List the runs of a home folder, newest first."),
        "status": Entry("runs.status", "Show the state of a run: done, running, pending and failed elements."),
        "logs": Entry("runs.logs", "Print the logs of a run."),
        "retry": Entry("runs.retry", "Submit the failed elements of a run again."),
        "cancel": Entry("runs.cancel", "Cancel the jobs of a run."),
        "sync": Entry("runs.sync", "Send the journals of runs to MLflow."),
    },
    "Configuration": {
        "doctor": Entry(
            "doctor.doctor", "Check what the jobs of a profile and recipe need, and report what is missing."
        ),
        "estimate": Entry("estimate", "Estimate the bytes on disk and the GPU hours of a recipe."),
        "config": Entry("config", "List every configuration key, or print a recipe as TOML."),
    },
}
ENTRIES: dict[str, Entry] = {name: entry for group in GROUPS.values() for name, entry in group.items()}


def load(name: str) -> tuple[Command[Any], str]:
    """Return a command and its description. Raises ValueError for a name that no command has."""
    if name not in ENTRIES:
        hint = did_you_mean(name, ENTRIES) or f"run `{PROGRAM}` to list the commands"
        raise ValueError(f"unknown command {name!r}; {hint}")
    module = importlib.import_module(f"jobs.commands.{ENTRIES[name].module}")
    return module.COMMAND, inspect.cleandoc(module.__doc__ or "")


def overview() -> str:
    """Return the help text of the launcher: every command with its summary, by group."""
    lines = [
        f"usage: {PROGRAM} COMMAND [OPTION ...]",
        "",
        "Submit the jobs of the suite to a Slurm cluster, or run them on this machine, and inspect their runs.",
    ]
    for title, entries in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10} {entry.summary}" for name, entry in entries.items())]
    lines += [
        "",
        "Options:",
        "  --help     Show this message, or after a command its options, and exit.",
        "  --version  Print the version and exit.",
    ]
    return "\n".join(lines)


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return a question with the known word closest to a mistyped one; None if none has a ratio of at least `cutoff`.

    The ratio is `difflib.SequenceMatcher.ratio`, 0 to 1. The shortest word that the mistyped one begins comes first.
    """
    begun = sorted((name for name in known if len(word) >= MIN_BEGINNING and name.startswith(word)), key=len)
    matches = begun or difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {matches[0]!r}?" if matches else None
