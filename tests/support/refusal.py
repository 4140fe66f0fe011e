"""The check of a command that refuses bad input."""

from collections.abc import Callable, Sequence

import pytest


def check_refusal(
    main: Callable[[list[str]], int], arguments: Sequence[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Assert that a command ends with exit code 2 and prints one line of error with the message."""
    try:
        code: object = main(list(arguments))
    except SystemExit as stopped:
        code = stopped.code
    errors = capfd.readouterr().err
    assert code == 2, errors
    assert message in errors
    assert errors.count("\n") == 1, errors
    assert errors.startswith("error: ")
