"""The rows of precomputed shards as rows of a dataset: columns of its arrays, and lines of its caption parts."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pixart.data.adoption.decoding import Decoder
from pixart.data.adoption.forms import LONG, SHORT, Block, Shard
from pixart.data.adoption.validity import (
    ConvertedLatents,
    convert_latents,
    first_problem,
    label_problems,
    text_problems,
    token_problems,
)
from pixart.data.captions.table import SCHEMA
from pixart.data.encoders.text_encoder import Tokenizer, vocabulary_size
from pixart.data.manifest import Manifest
from pixart.data.store.layout import VALID

ROWS_PER_BLOCK = 512  # 16 MiB of latents at 256 px
NO_LABEL = -1
Columns = dict[str, NDArray[Any]]


class TextColumns:
    """Turns token ids into captions and captions into token ids, by the tokenizer of a dataset."""

    def __init__(self, manifest: Manifest, tokenizer: Any) -> None:
        self.decoder = Decoder(tokenizer)
        self.vocabulary = vocabulary_size(manifest.data.text_encoder)
        self.padded = Tokenizer(tokenizer, max_tokens=manifest.data.max_text_tokens)
        self._no_caption = self.padded.tokenize([""])

    def problems(self, block: Block) -> list[NDArray[Any]]:
        """Return the problems of a block's rows, by caption."""
        by_tokens = [token_problems(*pair, self.vocabulary) for pair in block.tokens.values()]
        return by_tokens + [text_problems(texts) for texts in block.texts.values()]

    def captions(self, block: Block, prefix: str, valid: NDArray[np.bool_]) -> list[str]:
        """Return the captions of a block; those of invalid rows, and of rows without any, are empty."""
        texts = [""] * len(block)
        rows = np.flatnonzero(valid)
        if prefix in block.texts:
            captions = [block.texts[prefix][row] for row in rows]
        elif prefix in block.tokens:
            ids, mask = block.tokens[prefix]
            captions = self.decoder.decode(ids[rows], mask[rows] == 1)
        else:
            return texts
        for row, text in zip(rows, captions, strict=True):
            texts[row] = text
        return texts

    def tokens(
        self, block: Block, prefix: str, captions: list[str], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids and masks of a block, each (B, L); those of invalid rows are zeros."""
        if prefix in block.tokens:
            ids, mask = block.tokens[prefix][0].copy(), block.tokens[prefix][1] == 1
        elif prefix in block.texts:
            ids, mask = self.padded.tokenize(captions)
        else:
            ids, mask = (np.repeat(array, len(block), 0) for array in self._no_caption)
        ids[~valid], mask[~valid] = 0, 0
        return ids, mask


@dataclass(kw_only=True)
class PartLines:
    """The lines of a caption part so far."""

    captions: list[str] = field(default_factory=list)
    short_captions: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def table(self, shard_name: str, model: str) -> pa.Table:
        """Return the caption part of a shard file; there are no images, and so no columns that describe them."""
        rows = len(self.captions)
        given: dict[str, list[Any]] = {
            "id": [f"{shard_name}:{row}" for row in range(rows)],
            "label": self.labels,
            "caption": self.captions,
            "short_caption": self.short_captions,
            "valid": [problem == "" for problem in self.problems],
            "reason": self.problems,
            "detail": [""] * rows,
            "model": [model] * rows,
            "prompt_hash": [""] * rows,
            "sampling": [""] * rows,
        }
        columns = [
            pa.array(given[name], kind) if name in given else pa.nulls(rows, kind)
            for name, kind in zip(SCHEMA.names, SCHEMA.types, strict=True)
        ]
        return pa.table(columns, schema=SCHEMA)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adopted:
    """The rows of one block as columns of the dataset's arrays, with the moments of its valid latents."""

    columns: Columns
    sums: NDArray[np.float64]


def adopt_rows(manifest: Manifest, shard: Shard, text: TextColumns, lines: PartLines) -> Iterator[Adopted]:
    """Yield the rows of a shard in blocks, and add their captions to `lines`.

    Captions of a block are decoded or tokenized while the latents of the next block are converted.
    """
    pending: tuple[Adopted, Future[Columns]] | None = None
    with ThreadPoolExecutor(1) as thread:
        for block in shard.blocks(ROWS_PER_BLOCK):
            latents = convert_latents(block.latents)
            problems = [latents.problems, *text.problems(block)]
            labels = np.full(len(block), NO_LABEL)
            if block.labels is not None:
                problems.append(label_problems(block.labels, len(manifest.class_names) or None))
                labels = block.labels
            reasons = first_problem(problems)
            valid = reasons == ""
            lines.problems += reasons.tolist()
            lines.labels += np.where(valid, labels, NO_LABEL).tolist()
            captions = thread.submit(text_columns, manifest, text, block, valid, lines)
            if pending:
                yield with_text(*pending)
            pending = without_text(latents, labels, valid), captions
        if pending:
            yield with_text(*pending)


def without_text(latents: ConvertedLatents, labels: NDArray[np.int64], valid: NDArray[np.bool_]) -> Adopted:
    """Return the columns of a block that do not depend on captions; latents of invalid rows become zeros."""
    latents.values[~valid] = 0
    pixels = latents.values[0, 0].size
    return Adopted(
        columns={
            "latents": latents.values,
            "label": np.where(valid, labels, NO_LABEL).astype(np.int32),
            VALID: valid,
        },
        sums=np.concatenate([[valid.sum() * pixels], latents.sums[valid].sum(0).ravel()]),
    )


def with_text(adopted: Adopted, tokens: Future[Columns]) -> Adopted:
    """Return the block with its columns of token ids and masks."""
    return Adopted(columns={**adopted.columns, **tokens.result()}, sums=adopted.sums)


def text_columns(
    manifest: Manifest, text: TextColumns, block: Block, valid: NDArray[np.bool_], lines: PartLines
) -> Columns:
    """Return the columns of token ids and masks of a block, and add its captions to `lines`."""
    captions = {prefix: text.captions(block, prefix, valid) for prefix in (LONG, SHORT)}
    lines.captions += captions[LONG]
    lines.short_captions += captions[SHORT]
    columns: Columns = {}
    for prefix in (LONG, SHORT) if manifest.data.short_captions else (LONG,):
        ids, mask = text.tokens(block, prefix, captions[prefix], valid)
        columns[f"{prefix}token_ids"], columns[f"{prefix}token_mask"] = ids, mask
    return columns
