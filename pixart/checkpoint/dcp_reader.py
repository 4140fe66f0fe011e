"""Reading directories of torch.distributed.checkpoint without loading the pickle that describes them as a pickle.

Their own reader runs whatever code a `.metadata` file names. Here only its description of tensors is let in.
"""

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads for itself, as it means to
CLASSES = {
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


class DescriptionUnpickler(pickle.Unpickler):
    """Knows the classes that describe tensors, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} describes no tensor")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Reads the description once."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "described"):
            with (Path(self.path) / METADATA).open("rb") as file:
                metadata = DescriptionUnpickler(file).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("it describes no checkpoint")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            self.described = metadata
        return self.described

    @property
    def entries(self) -> dict[str, Any]:
        return self.read_metadata().state_dict_metadata

    def one(self, key: str) -> Any:
        """A tensor, whole, or what else is kept under this key."""
        entry = self.entries[key]
        tensor = isinstance(entry, TensorStorageMetadata)
        state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) if tensor else None}
        load(state, storage_reader=self, planner=Planner(flatten_state_dict=False), no_dist=True)
        return state[key]


class Planner(DefaultLoadPlanner):
    """Reads what is no tensor, such as the step, without running it."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def read(path: Path) -> dict[str, Any]:
    """`{"model", "model_ema", "optimizer", "step"}` as far as they are there, in memory.

    Raises ValueError for a directory that is no checkpoint, is damaged, or names code.
    """
    with readable(path):
        reader = Reader(path)
        found: dict[str, Any] = {}
        for group in ("model", "model_ema"):
            own = {key.removeprefix(f"{group}."): key for key in reader.entries if key.startswith(group + ".")}
            if own:
                found[group] = {name: reader.one(key) for name, key in own.items()}
        states: dict[str, dict[str, Any]] = {}
        for key in reader.entries:
            if key.startswith("optimizer.state."):
                name, _, field = key.removeprefix("optimizer.state.").rpartition(".")
                states.setdefault(name, {})[field] = reader.one(key)
        if states:
            found["optimizer"] = {"state": states}
        if "step" in reader.entries:
            found["step"] = reader.one("step")
        return found


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises ValueError for whatever a damaged file makes of the reader."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{path} cannot be read: it is no torch.distributed.checkpoint, or a damaged one") from error
