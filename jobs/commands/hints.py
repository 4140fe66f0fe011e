"""Construction of the next command that a command prints; it can be executed verbatim.

It has the options of the command that prints it, as far as the next command has them too. Values that come from a
configuration file are given by --config.
"""

import dataclasses
import shlex
from collections.abc import Sequence

from jobs.commands import registry
from jobs.commands.options import METADATA, CommonOptions
from jobs.state.run import Run
from pixart.recipes import DEFAULT_RECIPE

CARRIED = ("home", "recipe", "dataset", "cluster", "gpus_per_node", "overrides")  # fields of the options


def next_command(
    options: CommonOptions, name: str, *words: str, recipe: str | None = None, sections: Sequence[str] = ("",)
) -> str:
    """Return the command line of the command `name` with the given words, after a command that had `options`.

    `recipe` is the recipe that the command has worked with, if it is not known from the options. Of the overrides, only
    those of keys that begin with one of `sections` are carried.
    """
    given = options.typed or options
    available = {item.name for item in dataclasses.fields(options)}
    target = {item.name: item for item in dataclasses.fields(registry.load(name)[0].options)}
    carried = [field for field in CARRIED if field in target]
    line = [*registry.PROGRAM.split(), name, *words]
    if options.typed and any(
        field not in available or getattr(options, field) != getattr(given, field) for field in carried
    ):
        assert options.config  # options that were typed differ from the effective ones by the values of a file
        line += ["--config", options.config]
    for field in carried:
        value = getattr(given, field, None)
        if field == "recipe" and not value and not options.config and recipe != DEFAULT_RECIPE:
            value = recipe
        if field == "overrides":
            value = [item for item in value or () if item.startswith(tuple(sections))]
        for item in value if isinstance(value, list) else [value] if value else []:
            line += [target[field].metadata[METADATA].flags[0], str(item)]
    return shlex.join(line)


def describe_submission(options: CommonOptions, run: Run) -> str:
    """Return the lines that the launcher prints after a submission."""
    return (
        f"submitted {run.kind} as {', '.join(run.job_ids)}; run folder {run.folder}\n"
        f"next: {next_command(options, 'status', run.folder.name)}"
    )
