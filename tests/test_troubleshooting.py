"""Every symptom that docs/troubleshooting.md quotes is a message of the code."""

import ast
import re
from pathlib import Path

import pytest

from slurm import commands

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
SYMPTOMS = re.findall(r"^    (.+)$", PAGE, re.MULTILINE)
ENDS = re.findall(r"`([a-z_]+):`", PAGE.partition("## Words of Slurm")[2])
LEAST = 9  # letters of a string of the code
LEAST_SHARE = 0.3  # of a symptom's letters that one string of the code has; the others are values
# Messages of Slurm that the suite prints after the name of the command.
FOREIGN = (
    "Batch job submission failed: Invalid account or account/partition combination specified",
    "slurm_update error: Access/permission denied",
    "Socket timed out on send/recv operation",
    "No space left on device",
)


def letters(text: str) -> int:
    return len(re.findall("[A-Za-z]", text))


def template(node: ast.Constant | ast.JoinedStr) -> tuple[int, str]:
    """Return the number of letters of a string of the code, and a regular expression whose fields match any text."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value if isinstance(part, ast.Constant) else None for part in parts]
    count = sum(letters(text) for text in texts if isinstance(text, str))
    return count, "".join(re.escape(text) if isinstance(text, str) else ".*" for text in texts)


@pytest.fixture(scope="module")
def templates() -> list[tuple[int, re.Pattern[str]]]:
    """Regular expressions for the strings of the code, without docstrings, with their numbers of letters."""
    pairs = set()
    for package in ("jobs", "slurm", "pixart", "conversion"):
        for path in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            inner |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
            for node in nodes:
                is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
                if (is_text or isinstance(node, ast.JoinedStr)) and id(node) not in inner:
                    pairs.add(template(node))
    return [(count, re.compile(text)) for count, text in pairs if count >= LEAST]


def is_printed(symptom: str, templates: list[tuple[int, re.Pattern[str]]]) -> bool:
    """Return whether the code has a string that makes up most of a symptom."""
    message = re.sub(r"^(?:error|failed): |^missing +", "", symptom)
    least = LEAST_SHARE * letters(message)
    return any(count >= least and pattern.search(message) for count, pattern in templates)


def test_the_page_quotes_many_symptoms():
    assert len(SYMPTOMS) > 40
    assert len(set(SYMPTOMS)) == len(SYMPTOMS)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_symptom_is_a_message_of_the_code(templates, symptom):
    assert is_printed(symptom, templates) or any(text in symptom for text in FOREIGN)


def test_another_wording_does_not_match(templates):
    assert not is_printed("error: --cluster hpg: no profile of this name; choose one of dev or local", templates)
    assert not is_printed("the job has completed, but its result cannot be seen yet", templates)


def test_ends_of_jobs_are_states_of_slurm():
    assert {word.upper() for word in ENDS} == commands.TERMINAL_STATES - {"COMPLETED", "FAILED", "CANCELLED"}
