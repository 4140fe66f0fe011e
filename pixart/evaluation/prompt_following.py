"""Prompts with questions about their images, and the arithmetic of the answers.

GenEval 2 (Kamath et al., arXiv:2512.16853) has questions with answers and skills in each line. The objects that a line
of GenEval (Ghosh et al., arXiv:2310.11513) includes and excludes become counted questions.

Soft-TIFA, of GenEval 2, takes the probability that a judge gives to the right answer of a question in one token: its
arithmetic mean by skill, and the geometric mean over the questions of an image. A question that the judge does not
answer, with neither yes nor no for example, is counted as not judged. Imports nothing heavy.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import records

RIGHT = 0.5  # a question is right above this probability, where prompts are counted
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PLACES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
ALLOWED = (
    "each line must be a JSON object of GenEval 2 (prompt, vqa_list, skills), GenEval (prompt, tag, include) or prompt"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about an image, whose right answer is one word."""

    text: str
    answer: str
    skill: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The answers that count as an answer: yes and no, the numbers, or else none in particular."""
        if self.answer.lower() in ("yes", "no"):
            return ("yes", "no")
        return NUMBERS if normalized(self.answer) in NUMBERS else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A prompt and its questions; `tag` is its group in a benchmark, "" without one."""

    text: str
    questions: tuple[Question, ...] = ()
    tag: str = ""


def normalized(answer: str) -> str:
    """Return an answer in lower case and without surrounding spaces and full stop; digits become words."""
    word = answer.strip().strip(".").lower()
    return NUMBERS[int(word)] if word.isascii() and word.isdecimal() and int(word) < len(NUMBERS) else word


def read_question_file(path: Path) -> list[Prompt]:
    """Read prompts with questions from a file of JSON lines. Raises ValueError for a line of another form."""
    try:
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path}: {getattr(error, 'strerror', None) or error}") from None
    prompts = [read_line(line, f"--prompts {path}: line {number}") for number, line in enumerate(lines, 1)]
    if not prompts:
        raise ValueError(f"--prompts {path}: is empty; write one prompt per line")
    return prompts


def read_line(line: str, name: str) -> Prompt:
    """Return the prompt of one line. Raises ValueError, naming `name`, if it is of another form."""
    try:
        value = records.parse(line, Any, name)
    except ValueError as error:
        raise ValueError(f"{error}; {ALLOWED}") from None
    text = (
        next((value.get(key) for key in ("prompt", "text") if isinstance(value.get(key), str)), None)
        if isinstance(value, dict)
        else None
    )
    if not text:
        raise ValueError(f"{name}: has no prompt; {ALLOWED}")
    try:
        if "vqa_list" in value:
            pairs = zip(value["vqa_list"], value["skills"], strict=True)
            questions = tuple(Question(text=str(q), answer=str(a), skill=str(skill)) for (q, a), skill in pairs)
            return Prompt(text=text, questions=questions, tag=str(value.get("atom_count", "")))
        if "include" in value:
            return Prompt(text=text, questions=tuple(counted_questions(value)), tag=str(value.get("tag", "")))
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        raise ValueError(f"{name}: its questions are damaged; {ALLOWED}") from None
    return Prompt(text=text)


def counted_questions(value: Mapping[str, Any]) -> list[Question]:
    """Return the questions of a line of GenEval: number, color and position of what it includes and excludes."""
    tag, included = str(value.get("tag", "objects")), value["include"]
    questions = []
    for item in included:
        name, count = item["class"], int(item.get("count", 1))
        questions.append(Question(text=at_least(name, count), answer="yes", skill=tag))
        if color := item.get("color"):
            questions.append(Question(text=f"Is the {name} {color}?", answer="yes", skill=tag))
        if position := item.get("position"):
            place, other = PLACES[position[0]], included[int(position[1])]["class"]
            questions.append(Question(text=f"Is the {name} {place} the {other}?", answer="yes", skill=tag))
    for item in value.get("exclude", ()):
        questions.append(Question(text=at_least(item["class"], int(item["count"])), answer="no", skill=tag))
    return questions


def at_least(name: str, count: int) -> str:
    """Return the question whether an image shows at least `count` objects of a class."""
    if count == 1:
        return f"Does the image show {'an' if name[0] in 'aeiou' else 'a'} {name}?"
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    return f"Does the image show at least {number} objects of the kind '{name}'?"


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """A judge's answer to one question: the probability of the right answer, None if it gave no answer."""

    probability: float | None
    answer: str  # the most probable token


def judge_answer(question: Question, probabilities: Mapping[str, float], answer: str) -> Judgement:
    """Return the judgement from the probabilities of tokens, by their text, and the most probable one.

    The probability of an answer is the sum over its spellings, such as "Yes" and " yes" or "two" and "2". The question
    is not judged if its answers are limited and the most probable token is none of them.
    """
    right = sum(value for token, value in probabilities.items() if normalized(token) == normalized(question.answer))
    is_answer = not question.choices or normalized(answer) in question.choices
    return Judgement(probability=min(1.0, right) if is_answer else None, answer=answer)


def arithmetic_mean(values: Sequence[float]) -> float:
    """Return the mean of the probabilities of an image's questions."""
    return math.fsum(values) / len(values)


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Return the geometric mean of the probabilities of an image's questions; None if one was not judged."""
    judged = [value for value in values if value is not None]
    if not values or len(judged) < len(values):
        return None
    return 0.0 if min(judged) <= 0 else math.exp(math.fsum(math.log(value) for value in judged) / len(judged))


def all_right(values: Sequence[float | None]) -> bool | None:
    """Return whether all questions of an image are answered as they should be; None if one was not judged."""
    if not values or any(value is None for value in values):
        return None
    return all(value is not None and value > RIGHT for value in values)
