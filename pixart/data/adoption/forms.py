"""The forms of precomputed shards: which entries a file has, and blocks of its rows in one common form.

labels     `latents`, `labels`                                       .pt, or records `latent`, `label`
captions   `latents`, and of `short_caption` and `long_caption` the token ids and masks (`..._mask`)      .pt
tokens     `latents`, `text_tokens`, `attn_mask`                                                          .pt
texts      records `latent`, `short_caption`, `long_caption`                                    .array_record
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pixart.data.manifest import Form

LONG, SHORT = "", "short_"  # prefixes of the columns of a row's two captions
LATENT_BYTES = 2  # of a bfloat16

# The entries of each form besides the latents: the columns' prefix and the names of token ids and mask, or of the text.
LABELS = "labels"
TOKENS: Mapping[Form, Mapping[str, tuple[str, str]]] = {
    "captions": {LONG: ("long_caption", "long_caption_mask"), SHORT: ("short_caption", "short_caption_mask")},
    "tokens": {LONG: ("text_tokens", "attn_mask")},
}
TEXTS: Mapping[str, str] = {LONG: "long_caption", SHORT: "short_caption"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive rows of a shard; which fields are filled depends on the form."""

    latents: Tensor  # (B, C, h, w), bfloat16
    labels: NDArray[np.int64] | None = None  # (B,)
    tokens: Mapping[str, tuple[NDArray[np.int32], NDArray[np.int8]]] = field(default_factory=dict)  # each (B, L)
    texts: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.latents)


class Shard(Protocol):
    """One open file of precomputed rows."""

    path: Path
    form: Form
    rows: int
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    max_text_tokens: int | None  # width of the token ids; None for forms without

    def blocks(self, size: int) -> Iterator[Block]:
        """Yield all rows in blocks of `size`, the last of them shorter. Raises ValueError for a damaged file."""
        ...

    def labels(self, *, is_sample: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Return rows and their labels, both (N,); None for forms without labels.

        With `is_sample`, not all rows are returned if that takes reading the whole file.
        """
        ...

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the latents of rows, bfloat16 (len(rows), C, h, w)."""
        ...
