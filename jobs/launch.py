"""Entry point of the launcher: `python -m jobs.launch COMMAND`.

Exit codes: 0 success, 1 a failed job or an unreachable MLflow server, 2 bad input, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from jobs.commands import registry
from jobs.commands.options import Command, CommonOptions
from jobs.commands.parsing import parse
from pixart.terminal import printable

PACKAGE = "pixart-suite"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = run(words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # such as a folder without permission to write
        name = f"{error.filename}: " if error.filename else ""
        return fail(f"error: {name}{error.strerror or error}", 2)
    except ValueError as error:
        return fail(f"error: {error}", 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    return code


def run(words: list[str]) -> int:
    """Dispatch to the command. Raises ValueError for bad input."""
    if not words or words[0] in ("-h", "--help"):
        print(registry.overview())
        return 0
    if words[0] == "--version":
        print(f"{PACKAGE} {version()}")
        return 0
    if words[0].startswith("-"):
        hint = (
            registry.did_you_mean(words[0], ("--help", "--version"), cutoff=0.8)
            or "the command goes before its options"
        )
        raise ValueError(f"unknown option {words[0]!r}; {hint}")
    command, options = parse_command(words)
    if options.config:
        from pixart.config.keys import toml_file

        options = options.with_run_file(toml_file.load(options.config))

    from jobs.submission.launch import JobFailedError
    from jobs.tracking.mlflow_store import StoreError

    try:
        return command.run(options)
    except (JobFailedError, StoreError) as error:
        return fail(f"failed: {error}", 1)


def parse_command(words: list[str]) -> tuple[Command[Any], CommonOptions]:
    """Return the command that the first word names, and its options. Raises ValueError for an unknown command."""
    command, description = registry.load(words[0])
    program = f"{registry.PROGRAM} {words[0]}"
    return command, parse(command.options, words[1:], program=program, description=description)


def fail(message: str, code: int) -> int:
    print(printable(message), file=sys.stderr)
    return code


def version() -> str:
    """Return the version of the installed package, or say that the package is not installed."""
    from importlib import metadata

    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
