"""Rows are valid by the rule, for every kind of bytes that a buffer may hold."""

import numpy as np
import pytest
import torch

from pixart.data.adoption.validity import (
    Problem,
    convert_latents,
    first_problem,
    label_problems,
    text_problems,
    token_problems,
)
from tests.support.precomputed import random_latents


def naive_problem(row: torch.Tensor) -> str:
    values = row.double().numpy()
    if not np.isfinite(values).all() or np.abs(values).max() > np.finfo(np.float16).max:
        return Problem.NOT_FINITE
    return "" if values.std() > 1e-3 else Problem.CONSTANT


def test_latents_are_kept_to_the_precision_of_float16():
    latents = random_latents(33)
    converted = convert_latents(latents)
    assert (converted.problems == "").all()
    assert np.abs(converted.values.astype(np.float64) - latents.double().numpy()).max() <= 3e-8
    exact = latents.double().flatten(2)
    assert np.allclose(converted.sums[:, 0], exact.sum(-1), atol=1e-3)
    assert np.allclose(converted.sums[:, 1], exact.square().sum(-1), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.1, 5.0, -300.0, 60_000.0, 1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("spread", [0.0, 5e-4, 9e-4, 1.2e-3, 0.5, 100.0])
def test_rows_have_the_problem_that_a_naive_check_finds(value, spread):
    latents = (random_latents(3).float() * spread + value).to(torch.bfloat16)
    assert convert_latents(latents).problems.tolist() == [naive_problem(row) for row in latents]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 70_000.0])
def test_a_single_value_makes_a_row_invalid(value):
    latents = random_latents(20)
    latents[17, 3, 5, 1] = value
    assert np.flatnonzero(convert_latents(latents).problems == Problem.NOT_FINITE).tolist() == [17]


def test_random_bits_are_never_valid_and_never_an_error():
    bits = torch.randint(-(2**15), 2**15, (200, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    latents = bits.to(torch.int16).view(torch.bfloat16)
    problems = convert_latents(latents).problems
    assert problems.tolist() == [naive_problem(row) for row in latents]
    assert (problems == "").sum() == 0


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ([1, 1, 1, 1], ""),
        ([1, 0, 0, 0], ""),
        ([0, 0, 0, 0], Problem.MASK),
        ([0, 1, 1, 1], Problem.MASK),
        ([1, 0, 1, 0], Problem.MASK),
        ([1, 2, 0, 0], Problem.MASK),
        ([-1, 0, 0, 0], Problem.MASK),
        ([127, 1, 0, 0], Problem.MASK),
    ],
)
def test_masks_are_prefixes_of_ones(mask, problem):
    problems = token_problems(np.full((1, 4), 5, np.int32), np.array([mask], np.int8), 10)
    assert problems.tolist() == [problem]


@pytest.mark.parametrize(("token", "problem"), [(0, ""), (9, ""), (10, Problem.VOCABULARY), (-1, Problem.VOCABULARY)])
def test_masked_ids_must_be_in_the_vocabulary(token, problem):
    ids = np.array([[1, 2, token], [1, 2, 3]], np.int32)
    assert token_problems(ids, np.array([[1, 0, 0]] * 2, np.int8), 10).tolist() == [problem, ""]


def test_labels_and_texts():
    labels = np.array([-1, 0, 4, 5, 30_000])
    assert label_problems(labels, 5).tolist() == [Problem.LABEL, "", "", Problem.LABEL, Problem.LABEL]
    assert label_problems(labels, None).tolist() == [Problem.LABEL, "", "", "", ""]
    assert text_problems(["a dog", "", " \n"]).tolist() == ["", Problem.NO_TEXT, Problem.NO_TEXT]


def test_the_first_problem_of_a_row_counts():
    problems = [np.array(row, object) for row in (["", "a", ""], ["b", "b", ""])]
    assert first_problem(problems).tolist() == ["b", "a", ""]
