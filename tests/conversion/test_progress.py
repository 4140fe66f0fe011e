"""The lines of a conversion in a log."""

import re

import pytest

from conversion.progress import Progress


def test_a_step_is_named_as_it_begins(capsys):
    """Except for the first one, in which invalid input is found."""
    with Progress(3) as progress:
        progress.begin("reading")
        assert capsys.readouterr().err == ""
        progress.begin("writing")
        assert re.fullmatch(r"reading: 0\.\d s\nwriting: ", capsys.readouterr().err)
    assert re.fullmatch(r"0\.\d s\n", capsys.readouterr().err)


@pytest.mark.parametrize(("steps", "lines"), [(1, ""), (2, "failed\n")])
def test_an_error_begins_a_line(capsys, steps: int, lines: str):
    def fail() -> None:
        with Progress(3) as progress:
            for step in range(steps):
                progress.begin(f"step {step}")
            capsys.readouterr()
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert capsys.readouterr().err == lines


def test_other_ranks_print_nothing(capsys):
    with Progress(2, enabled=False) as progress:
        progress.begin("reading")
        progress.begin("writing")
    assert capsys.readouterr().err == ""
