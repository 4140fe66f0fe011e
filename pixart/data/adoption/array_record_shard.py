"""Reading of `*.array_record` files with one pickled dict per record (`group_size:1`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart.data.adoption.forms import TEXTS, Block
from pixart.data.adoption.pickles import read_record
from pixart.data.manifest import Form

LATENT, LABEL = "latent", "label"
FORMS: dict[frozenset[str], Form] = {
    frozenset({LATENT, LABEL}): "labels",
    frozenset({LATENT, *TEXTS.values()}): "texts",
}
ALLOWED = "; ".join(f"{form}: {', '.join(sorted(keys))}" for keys, form in FORMS.items())
MAX_LABEL = 2**31 - 1
NUM_CHECKED = 256  # records that are checked when a file is opened, evenly spaced
NUM_READ = 256  # records that are read at a time
INSTALL = "pip install 'pixart-suite[array-record]'"


class ArrayRecordShard:
    """An ArrayRecord file of one of FORMS.

    Raises ValueError if the package array_record is not installed, if the file is damaged, or if a record has another
    form than the first. All records of a small file are checked when it is opened, a sample of those of a large one;
    the others are checked when they are read.
    """

    max_text_tokens: int | None = None

    def __init__(self, path: Path) -> None:
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise ValueError(f"{path}: reading it needs the package array_record ({error}); run {INSTALL}") from None
        self.path = path
        self._reader = ArrayRecordReader(str(path))
        self.rows: int = self._reader.num_records()
        if not self._reader.ok() or not self.rows:
            raise ValueError(f"{path} cannot be read: it is not an ArrayRecord file with records, or it is truncated")
        (first,) = self._read([0])
        form = FORMS.get(frozenset(first))
        if form is None:
            raise ValueError(
                f"{path}: its records have {', '.join(sorted(first)) or 'nothing'}; the forms are {ALLOWED}"
            )
        latent = first[LATENT]
        if not isinstance(latent, np.ndarray) or latent.ndim != 3 or not latent.size:
            raise ValueError(f"{path}: record 0: the latent is no array of shape (C, h, w)")
        self.form: Form = form
        channels, height, width = latent.shape
        self.latent_shape = (channels, height, width)
        self._sample = range(0, self.rows, max(1, self.rows // NUM_CHECKED))
        for row in self._sample:
            self._check(row, self._read([row])[0])

    def _read(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Return the records of ascending rows. Raises ValueError if one is damaged or no record of latents."""
        try:
            contents = self._reader.read(list(rows))
        except Exception as error:  # the reader raises RuntimeError and IndexError, with texts of several lines
            raise ValueError(f"{self.path} cannot be read: {' '.join(str(error).split())}") from error
        records = []
        for row, content in zip(rows, contents, strict=True):
            try:
                records.append(read_record(content))
            except ValueError as error:
                raise ValueError(f"{self.path}: record {row}: {error}") from None
        return records

    def _check(self, row: int, record: dict[str, Any]) -> None:
        """Check the types and shapes of a record. Raises ValueError, naming its row."""
        if FORMS.get(frozenset(record)) != self.form:
            raise ValueError(f"{self.path}: record {row} has {', '.join(sorted(record))}, unlike record 0")
        latent = record[LATENT]
        if not isinstance(latent, np.ndarray) or latent.dtype != np.int16 or latent.shape != self.latent_shape:
            kind = (
                f"{latent.dtype} of shape {latent.shape}" if isinstance(latent, np.ndarray) else type(latent).__name__
            )
            raise ValueError(
                f"{self.path}: record {row}: the latent is {kind}; it must be int16 of {self.latent_shape}"
            )
        if self.form == "labels" and not (isinstance(record[LABEL], int) and abs(record[LABEL]) <= MAX_LABEL):
            raise ValueError(f"{self.path}: record {row}: the label is no integer of 32 bits")
        if self.form == "texts" and not all(isinstance(record[name], str) for name in TEXTS.values()):
            raise ValueError(f"{self.path}: record {row}: a caption is no text")

    def blocks(self, size: int) -> Iterator[Block]:
        for start in range(0, self.rows, size):
            rows = range(start, min(start + size, self.rows))
            records = self._read(rows)
            for row, record in zip(rows, records, strict=True):
                self._check(row, record)
            yield Block(
                latents=bfloat16([record[LATENT] for record in records]),
                labels=np.array([record[LABEL] for record in records], np.int64) if self.form == "labels" else None,
                texts={prefix: [printable(record[name]) for record in records] for prefix, name in TEXTS.items()}
                if self.form == "texts"
                else {},
            )

    def labels(self, *, is_sample: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        if self.form != "labels":
            return None
        rows = self._sample if is_sample else range(self.rows)
        labels: list[int] = []
        for start in range(0, len(rows), NUM_READ):
            part = rows[start : start + NUM_READ]
            for row, record in zip(part, self._read(part), strict=True):
                self._check(row, record)
                labels.append(record[LABEL])
        return np.array(rows, np.int64), np.array(labels, np.int64)

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        order = np.argsort(rows)
        latents = bfloat16([record[LATENT] for record in self._read(rows[order].tolist())])
        return latents[torch.from_numpy(np.argsort(order))]


def bfloat16(latents: list[NDArray[np.int16]]) -> Tensor:
    """Return the bits of latents as a tensor (B, C, h, w)."""
    return torch.from_numpy(np.stack(latents)).view(torch.bfloat16)


def printable(text: str) -> str:
    """Return valid Unicode: a pickle may hold halves of surrogate pairs, which no tokenizer and no file takes."""
    return text.encode(errors="replace").decode()
