"""Decoding of token ids into captions, many at once.

The text of most tokens depends on whether they come first, and on no other token. A caption of such tokens is a join of
strings, for which pyarrow takes a twentieth of the time of the tokenizers library.
"""

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

REPLACEMENT = "\ufffd"  # what a part of a character is decoded to


class Decoder:
    """Decodes token ids as the tokenizer's `batch_decode` does without special tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special = np.array(sorted({*special, *tokenizer.all_special_ids}), np.int64)

    @functools.cached_property
    def _pieces(self) -> pa.Array:
        return pieces(self.tokenizer)

    def decode(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> list[str]:
        """Return the texts of token ids, shape (B, L); those outside of the mask, shape (B, L), are left out."""
        if not self.tokenizer.is_fast:
            return self.tokenizer.batch_decode(rows_of(ids, mask), skip_special_tokens=True)
        kept = mask & ~np.isin(ids, self._special)
        offsets = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        size = len(self._pieces) // 2
        indices = np.minimum(ids[kept], size - 1)  # the last one is null
        indices[offsets[:-1][np.diff(offsets) > 0]] += size  # tokens that come first
        joined = pc.binary_join(pa.ListArray.from_arrays(offsets, self._pieces.take(pa.array(indices))), "")
        texts: list[str] = joined.to_pylist()
        others = np.flatnonzero(joined.is_null())
        decoded = self.tokenizer.backend_tokenizer.decode_batch(
            rows_of(ids[others], mask[others]), skip_special_tokens=True
        )
        for row, text in zip(others, decoded, strict=True):
            texts[row] = text
        # transformers cleans up the text of BPE tokenizers under a condition of its own; none of them asks for it.
        if (
            self.tokenizer.clean_up_tokenization_spaces
            and type(self.tokenizer.backend_tokenizer.model).__name__ != "BPE"
        ):
            texts = [self.tokenizer.clean_up_tokenization(text) for text in texts]
        return texts


def rows_of(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> list[list[int]]:
    """Return the token ids within the mask, by row."""
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def pieces(tokenizer: Any) -> pa.Array:
    """Return the text of each token after another one, a null, the text of each token that comes first, and a null.

    It is null for tokens whose text changes beside others, such as parts of a character, and for added tokens.
    """
    backend = tokenizer.backend_tokenizer
    every = np.arange(1 + max(backend.get_vocab(with_added_tokens=True).values()))

    def decode(*tokens: Any) -> list[str]:
        """Return the texts of sequences, given by the token or the tokens at each position."""
        sequences = np.stack(np.broadcast_arrays(*tokens), 1).tolist()
        return backend.decode_batch(sequences, skip_special_tokens=True)

    first = decode(every)
    is_regular = np.array([REPLACEMENT not in text for text in first])
    is_regular[list(tokenizer.added_tokens_decoder)] = False
    visible = np.flatnonzero(is_regular & np.array([text.strip() != "" for text in first]))
    if not len(visible):
        return pa.nulls(2 * len(every) + 2, pa.string())
    neighbors = visible[[len(visible) // 3, -1 - len(visible) // 3]].tolist()  # put before and after each token
    after = [text.removeprefix(first[neighbors[0]]) for text in decode(neighbors[0], every)]
    for neighbor in neighbors:
        is_regular &= [
            text == first[neighbor] + piece for text, piece in zip(decode(neighbor, every), after, strict=True)
        ]
        is_regular &= [
            text == piece + after[neighbor] for text, piece in zip(decode(every, neighbor), first, strict=True)
        ]
    is_null = np.append(~is_regular, True)
    return pa.concat_arrays([pa.array([*texts, ""], pa.string(), mask=is_null) for texts in (after, first)])
