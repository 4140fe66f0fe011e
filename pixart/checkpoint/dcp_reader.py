"""Reading of torch.distributed.checkpoint (DCP) directories without executing pickled code.

torch's reader unpickles the `.metadata` file and so runs any code that it names. Here only the classes that
describe tensors can be unpickled.
"""

import functools
import io
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from pixart.checkpoint.lazy_tensors import LazyTensors

METADATA = ".metadata"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # reading in one process is intended
ALLOWED_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int32", "int64", "strided", "_utils"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that loads ALLOWED_CLASSES only and raises UnpicklingError for any other."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the metadata of a checkpoint")
        return super().find_class(module, name)


class RestrictedReader(FileSystemReader):
    """FileSystemReader that loads the metadata once, with RestrictedUnpickler."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "metadata"):
            with (Path(self.path) / METADATA).open("rb") as file:
                metadata = RestrictedUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("the metadata does not describe a checkpoint")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            self.metadata = metadata
        return self.metadata

    @property
    def entries(self) -> dict[str, Any]:
        """Metadata of each stored tensor or object, by key."""
        return self.read_metadata().state_dict_metadata

    def read_value(self, key: str) -> Any:
        """Return the unsharded tensor, or the object, that is stored under `key`."""
        entry = self.entries[key]
        is_tensor = isinstance(entry, TensorStorageMetadata)
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None}
        load(state, storage_reader=self, planner=WeightsOnlyPlanner(flatten_state_dict=False), no_dist=True)
        return state[key]


class WeightsOnlyPlanner(DefaultLoadPlanner):
    """Load planner that reads objects other than tensors, such as the step, with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read_training_state(path: Path) -> dict[str, Any]:
    """Read the entries of `{"model", "model_ema", "optimizer", "step"}` that exist into memory.

    Raises ValueError for a directory that is not a checkpoint, is damaged, or names code.
    """
    with raise_value_error(path):
        reader = RestrictedReader(path)
        state: dict[str, Any] = {}
        for group in ("model", "model_ema"):
            keys = {key.removeprefix(f"{group}."): key for key in reader.entries if key.startswith(group + ".")}
            if keys:
                state[group] = {name: reader.read_value(key) for name, key in keys.items()}
        parameters: dict[str, dict[str, Any]] = {}
        for key in reader.entries:
            if key.startswith("optimizer.state."):
                name, _, field = key.removeprefix("optimizer.state.").rpartition(".")
                parameters.setdefault(name, {})[field] = reader.read_value(key)
        if parameters:
            state["optimizer"] = {"state": parameters}
        if "step" in reader.entries:
            state["step"] = reader.read_value("step")
        return state


def lazy_groups(folder: Path, groups: Sequence[str]) -> dict[str, LazyTensors]:
    """Return the unsharded tensors of each group of keys `GROUP.NAME`, read on access.

    Raises ValueError if the directory cannot be read.
    """
    with raise_value_error(folder):
        reader = RestrictedReader(folder)
        keys: dict[str, list[str]] = {group: [] for group in groups}
        for key in reader.entries:
            keys[key.partition(".")[0]].append(key)

    def lazy(group: str) -> LazyTensors:
        names = {key.removeprefix(f"{group}."): key for key in keys[group]}
        return LazyTensors(
            {name: functools.partial(reader.read_value, key) for name, key in names.items()},
            {name: torch.empty(reader.entries[key].size, device="meta") for name, key in names.items()},
        )

    return {group: lazy(group) for group in groups}


@contextmanager
def raise_value_error(path: Path) -> Iterator[None]:
    """Raise ValueError for any exception that a damaged file causes in the reader."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read; it is not a torch.distributed.checkpoint directory, or it is damaged"
        ) from error
