"""Which rows of precomputed shards are valid.

The buffers that the shards were written from were never initialized: rows at a shard's end may hold zeros or arbitrary
bytes, in latents, labels, token ids and masks alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_STD = 1e-3  # of a row's latents, over all its values
ROWS_PER_PASS = 16  # 1 MiB of latents in float32, which a core's cache holds through all steps of a pass
CANCELLATION = 1e-2  # relative variance below which the one-pass formula is too inexact in float32


class Problem:
    """Reasons for which a row is invalid, in the order in which they are looked for."""

    NOT_FINITE = "latents: not finite in float16"
    CONSTANT = "latents: constant"
    MASK = "tokens: mask is empty or not a prefix of ones"
    VOCABULARY = "tokens: outside the vocabulary"
    LABEL = "label: not one of the classes"
    NO_TEXT = "caption: no text"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedLatents:
    """Latents in float16 with what one pass over them measures."""

    values: NDArray[np.float16]  # (B, C, h, w)
    problems: NDArray[Any]  # (B,) of str: "" or a Problem
    sums: NDArray[np.float64]  # (B, 2, C): sum and sum of squares of each channel


def convert_latents(latents: Tensor) -> ConvertedLatents:
    """Convert latents, bfloat16 (B, C, h, w), to float16 and find the rows that hold none.

    float16 has more mantissa bits than bfloat16, so that values of the size of latents lose at most 3e-8.
    """
    rows, channels = latents.shape[:2]
    flat = latents.reshape(rows, channels, -1)
    values = torch.empty(flat.shape, dtype=torch.float16)
    sums = torch.empty((rows, 2, channels))
    buffer = torch.empty((min(rows, ROWS_PER_PASS), *flat.shape[1:]))
    for start in range(0, rows, ROWS_PER_PASS):
        part = values[start : start + ROWS_PER_PASS]
        block = buffer[: len(part)]
        part.copy_(block.copy_(flat[start : start + ROWS_PER_PASS]))
        torch.sum(block, -1, out=sums[start : start + len(part), 0])
        torch.sum(block.mul_(block), -1, out=sums[start : start + len(part), 1])
    moments = sums.numpy().astype(np.float64)
    problems = latent_problems(values.numpy(), moments)
    return ConvertedLatents(values=values.numpy().reshape(latents.shape), problems=problems, sums=moments)


def latent_problems(values: NDArray[np.float16], moments: NDArray[np.float64]) -> NDArray[Any]:
    """Return the problem of each row, "" or a Problem, of latents (B, C, n) with the sums (B, 2, C)."""
    size = values[0].size
    totals = moments.sum(2)
    problems = np.full(len(values), "", object)
    limit = float(np.finfo(np.float16).max)
    # Only a row with a large sum of squares can hold a value that overflows.
    suspect = ~np.isfinite(totals[:, 1]) | (totals[:, 1] > limit**2)
    for row in np.flatnonzero(suspect):
        if not np.isfinite(values[row]).all():
            problems[row] = Problem.NOT_FINITE
    with np.errstate(invalid="ignore"):
        square = totals[:, 1] / size
        variance = square - (totals[:, 0] / size) ** 2
        inexact = (variance < CANCELLATION * square) | suspect
    for row in np.flatnonzero(inexact & (problems == "")):
        variance[row] = values[row].astype(np.float64).var()
    problems[(problems == "") & ~(variance > MIN_STD**2)] = Problem.CONSTANT
    return problems


def token_problems(ids: NDArray[np.int32], mask: NDArray[np.int8], vocabulary: int) -> NDArray[Any]:
    """Return the problem of each row, "" or a Problem, of token ids and masks, each (B, L)."""
    is_prefix = ((mask == 0) | (mask == 1)).all(1) & (mask[:, 1:] <= mask[:, :-1]).all(1) & (mask[:, 0] == 1)
    known = ((ids >= 0) & (ids < vocabulary)).all(1)
    return np.where(~is_prefix, Problem.MASK, np.where(~known, Problem.VOCABULARY, "")).astype(object)


def label_problems(labels: NDArray[np.int64], num_classes: int | None) -> NDArray[Any]:
    """Return the problem of each row, "" or a Problem, of labels (B,); the number of classes may be unknown."""
    beyond = labels >= num_classes if num_classes is not None else np.zeros(len(labels), bool)
    return np.where((labels < 0) | beyond, Problem.LABEL, "").astype(object)


def text_problems(texts: list[str]) -> NDArray[Any]:
    """Return the problem of each row, "" or a Problem, of captions."""
    return np.array([("" if text.strip() else Problem.NO_TEXT) for text in texts], object)


def first_problem(problems: list[NDArray[Any]]) -> NDArray[Any]:
    """Return the first problem of each row, "" for a valid one."""
    first = problems[0].copy()
    for other in problems[1:]:
        first[first == ""] = other[first == ""]
    return first
