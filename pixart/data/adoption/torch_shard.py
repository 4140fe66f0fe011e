"""Reading of `shard_000000.pt` files, memory-mapped: each is a dict of tensors with one row per image."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart.data.adoption.forms import LABELS, TOKENS, Block
from pixart.data.manifest import Form
from pixart.data.torch_archive import check_archive

LATENTS = "latents"
FORMS: dict[frozenset[str], Form] = {
    frozenset({LATENTS, LABELS}): "labels",
    **{
        frozenset({LATENTS, *(name for pair in names.values() for name in pair)}): form
        for form, names in TOKENS.items()
    },
}
ALLOWED = "; ".join(f"{form}: {', '.join(sorted(keys))}" for keys, form in FORMS.items())


class TorchShard:
    """A `.pt` file of one of FORMS. Raises ValueError if it is damaged, or its entries are of other types or shapes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = load(path)
        form = FORMS.get(frozenset(self._tensors))
        if form is None:
            raise ValueError(
                f"{path}: has the entries {', '.join(sorted(self._tensors)) or 'none'}; the forms are {ALLOWED}"
            )
        self.form: Form = form
        latents = self._tensors[LATENTS]
        if latents.dtype != torch.bfloat16 or latents.ndim != 4 or not latents.numel():
            raise ValueError(f"{path}: latents are {describe(latents)}; they must be bfloat16 of shape (N, C, h, w)")
        self.rows = len(latents)
        channels, height, width = latents.shape[1:]
        self.latent_shape = (channels, height, width)
        self.max_text_tokens: int | None = None
        if form == "labels":
            self._check(LABELS, torch.int16, (self.rows,))
        for ids, mask in TOKENS.get(form, {}).values():
            if self.max_text_tokens is None:
                self.max_text_tokens = self._tensors[ids].shape[-1] if self._tensors[ids].ndim == 2 else 1
            self._check(ids, torch.int32, (self.rows, self.max_text_tokens))
            self._check(mask, torch.int8, (self.rows, self.max_text_tokens))

    def _check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Check the type and shape of an entry. Raises ValueError, naming the entry."""
        tensor = self._tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{self.path}: {name} is {describe(tensor)}; with {self.rows} latents it must be "
                f"{str(dtype).removeprefix('torch.')} of shape {shape}"
            )

    def blocks(self, size: int) -> Iterator[Block]:
        names = TOKENS.get(self.form, {})
        labels = self._tensors[LABELS].numpy().astype(np.int64) if self.form == "labels" else None
        for start in range(0, self.rows, size):
            rows = slice(start, start + size)
            yield Block(
                latents=self._tensors[LATENTS][rows],
                labels=None if labels is None else labels[rows],
                tokens={
                    prefix: (self._tensors[ids][rows].numpy(), self._tensors[mask][rows].numpy())
                    for prefix, (ids, mask) in names.items()
                },
            )

    def labels(self, *, is_sample: bool = False) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        if self.form != "labels":
            return None
        return np.arange(self.rows), self._tensors[LABELS].numpy().astype(np.int64)

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        return self._tensors[LATENTS][torch.from_numpy(rows)]


def load(path: Path) -> Mapping[str, Tensor]:
    """Map the tensors of a `.pt` file. Raises ValueError if it holds anything but named, contiguous tensors."""
    check_archive(path, "file of tensors")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many types of exception for a damaged or malicious archive
        raise ValueError(f"{path} cannot be read: it is not a file of tensors alone, or it is truncated") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: holds no dict of named tensors; the forms are {ALLOWED}")
    for name, value in content.items():
        on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
        if not on_cpu or value.layout != torch.strided or not value.is_contiguous():
            raise ValueError(f"{path}: {name} is not a contiguous tensor; the forms are {ALLOWED}")
        if value.untyped_storage().nbytes() < (value.storage_offset() + value.numel()) * value.element_size():
            raise ValueError(f"{path}: {name} is larger than its data; the file is damaged")
    return {name: value.detach() for name, value in content.items()}


def describe(tensor: Tensor) -> str:
    """Return the type and shape of a tensor as text."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
