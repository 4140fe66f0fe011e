"""Questions of the known file formats, and the arithmetic of Soft-TIFA."""

import json
from pathlib import Path

import pytest

from pixart.evaluation.prompt_following import (
    Question,
    all_right,
    arithmetic_mean,
    geometric_mean,
    judge_answer,
    read_question_file,
)

GENEVAL2 = {
    "prompt": "two red cubes",
    "atom_count": 2,
    "vqa_list": [["How many cubes are in the image?", "two"], ["Are the cubes red?", "Yes"]],
    "skills": ["count", "attribute"],
}
GENEVAL = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 2},
        {"class": "apple", "count": 1, "color": "red", "position": ["left of", 0]},
    ],
    "exclude": [{"class": "dog", "count": 3}],
    "prompt": "a red apple left of two dogs",
}


def write(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_questions_of_geneval2(tmp_path: Path):
    (prompt,) = read_question_file(write(tmp_path / "a.jsonl", GENEVAL2))
    assert prompt.text == "two red cubes"
    assert [(one.answer, one.skill) for one in prompt.questions] == [("two", "count"), ("Yes", "attribute")]
    assert "three" in prompt.questions[0].choices
    assert prompt.questions[1].choices == ("yes", "no")


def test_counted_questions_of_geneval(tmp_path: Path):
    (prompt,) = read_question_file(write(tmp_path / "a.jsonl", GENEVAL))
    assert [(one.text, one.answer) for one in prompt.questions] == [
        ("Does the image show at least two objects of the kind 'dog'?", "yes"),
        ("Does the image show an apple?", "yes"),
        ("Is the apple red?", "yes"),
        ("Is the apple to the left of the dog?", "yes"),
        ("Does the image show at least three objects of the kind 'dog'?", "no"),
    ]
    assert prompt.tag == "position"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog", "line 1: is not JSON"),
        ("[1]", "line 1: has no prompt"),
        ('{"prompt": "a", "vqa_list": [["q"]], "skills": ["s"]}', "line 1: its questions are damaged"),
        ('{"prompt": "a", "include": [{"count": 1}]}', "line 1: its questions are damaged"),
        ("", "is empty"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_question_file(tmp_path / "a.jsonl")


def test_probabilities_of_all_spellings_count():
    question = Question(text="", answer="Yes", skill="")
    judged = judge_answer(question, {"Yes": 0.5, " yes": 0.2, "no": 0.1}, "Yes")
    assert judged.probability == pytest.approx(0.7)
    assert judge_answer(question, {"Yes": 0.3}, " the").probability is None  # neither yes nor no
    count = Question(text="", answer="2", skill="")
    assert judge_answer(count, {"two": 0.25, "2": 0.25}, "3").probability == pytest.approx(0.5)


def test_means():
    assert arithmetic_mean([0.5, 1.0]) == 0.75
    assert geometric_mean([0.25, 1.0]) == pytest.approx(0.5)
    assert geometric_mean([0.0, 1.0]) == 0
    assert geometric_mean([None, 1.0]) is None
    assert geometric_mean([]) is None
    assert all_right([0.6, 0.9])
    assert not all_right([0.6, 0.4])
    assert all_right([0.6, None]) is None
