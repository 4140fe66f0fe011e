"""The training set as Zarr arrays: one data shard is one Zarr shard, one chunk is one row.

Written with zarr-python, a whole shard at a time by one writer; read with tensorstore, 17 times faster at random
rows. `valid` is written last and fills with 0, so that rows of an unfinished shard are never read.
"""

from pathlib import Path

import numpy as np
import tensorstore
import zarr

from pixart.data.manifest import Manifest

FILE = "latents.zarr"
VALID = "valid"


def layout(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], str]]:
    """Array name -> shape of one row and dtype."""
    tokens = manifest.data.text_tokens
    arrays: dict[str, tuple[tuple[int, ...], str]] = {
        "latents": (manifest.latent_shape, "float16"),
        "label": ((), "int32"),
        "token_ids": ((tokens,), "int32"),
        "token_mask": ((tokens,), "bool"),
        VALID: ((), "bool"),
    }
    if manifest.data.text_states:
        arrays["text_states"] = ((tokens, manifest.text_dim), "float16")
    return arrays


def create(manifest: Manifest) -> None:
    """Makes the empty arrays; those that are there are left as they are."""
    group = zarr.open_group(Path(manifest.data.path) / FILE, mode="a")
    for name, (shape, dtype) in layout(manifest).items():
        if name in group:
            continue
        group.create_array(
            name,
            shape=(manifest.rows, *shape),
            dtype=dtype,
            chunks=(1 if shape else manifest.rows_per_shard, *shape),
            shards=(manifest.rows_per_shard, *shape),
            compressors=None,
            fill_value=0,
        )
    if "channel_sums" not in group:  # per shard: count, sums and sums of squares of the valid latents
        shape = (manifest.data.shards, 1 + 2 * manifest.latent_shape[0])
        group.create_array("channel_sums", shape=shape, dtype="float64", chunks=(1, shape[1]), fill_value=0)


def write_shard(manifest: Manifest, shard: int, columns: dict[str, np.ndarray]) -> None:
    """Writes every row of one shard, in place of what an earlier attempt left; `columns` by the names of `layout`.

    The shard is marked invalid first and valid last. Raises ValueError for missing columns or other shapes.
    """
    group = zarr.open_group(Path(manifest.data.path) / FILE, mode="r+")
    begin, count = shard * manifest.rows_per_shard, len(columns[VALID])
    rows = slice(begin, begin + count)
    if columns.keys() != layout(manifest).keys():
        raise ValueError(f"shard {shard} has columns {sorted(columns)}, not {sorted(layout(manifest))}")
    whole = slice(begin, begin + manifest.rows_per_shard)
    group[VALID][whole] = False
    for name, (shape, dtype) in layout(manifest).items():
        if columns[name].shape != (count, *shape):
            raise ValueError(f"shard {shard}: {name} has shape {columns[name].shape}, not {(count, *shape)}")
        if name != VALID:
            padded = np.zeros((manifest.rows_per_shard, *shape), dtype)
            padded[:count] = columns[name]
            group[name][whole] = padded
    latents = columns["latents"][columns[VALID]].astype(np.float64)
    sums = [[len(latents) * latents[0, 0].size] if len(latents) else [0], latents.sum((0, 2, 3))]
    group["channel_sums"][shard] = np.concatenate([*sums, np.square(latents).sum((0, 2, 3))])
    group[VALID][rows] = columns[VALID]


class Store:
    """Random access to the rows of a finished dataset. Raises ValueError where nothing was written."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.path = Path(manifest.data.path) / FILE
        if not self.path.exists():
            raise ValueError(f"dataset {manifest.data.path} has no latents yet: run the latents job first")
        self.arrays = {name: self._open(name) for name in layout(manifest)}

    def _open(self, name: str) -> tensorstore.TensorStore:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{self.path.absolute()}/{name}/"}}
        return tensorstore.open(spec, read=True, open=True).result()

    def valid_rows(self) -> np.ndarray:
        """Indices of the rows that may be trained on, ascending -> int64 (valid,)."""
        return np.flatnonzero(self.arrays[VALID].read().result())

    def read(self, name: str, rows: np.ndarray) -> np.ndarray:
        """-> (len(rows), ...) in the order of `rows`."""
        return self.arrays[name][rows].read().result()

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the valid latents by channel; all the same if the dataset says `scalar`."""
        totals = np.asarray(zarr.open_group(self.path, mode="r")["channel_sums"]).sum(0)
        if totals[0] == 0:
            raise ValueError(f"dataset {self.manifest.data.path} has no valid row")
        mean, square = totals[1:].reshape(2, -1) / totals[0]
        if self.manifest.data.normalization == "scalar":
            mean, square = np.full_like(mean, mean.mean()), np.full_like(square, square.mean())
        return tuple(mean.tolist()), tuple(np.sqrt(square - mean**2).tolist())
