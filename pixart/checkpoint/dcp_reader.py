"""Reading of torch.distributed.checkpoint (DCP) directories without executing pickled code.

torch's reader unpickles the `.metadata` file and so runs any code that it names. Here only the classes that
describe tensors can be unpickled.
"""

import functools
import io
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PosixPath, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.serialization import _get_layout

from pixart.checkpoint import inert_pickle
from pixart.checkpoint.lazy_tensors import LazyTensors
from pixart.restricted_pickle import RefusedPickleError, RestrictedUnpickler
from pixart.terminal import printable

METADATA = ".metadata"
MAX_METADATA_BYTES = 512 << 20  # the metadata of a model on 4,096 ranks is a tenth of it
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # reading in one process is intended
MOVED_MODULES = {"pathlib._local": "pathlib"}  # where Python 3.13 says that the class is
CALLABLE = (torch.Size, OrderedDict, PosixPath, _get_layout, _MEM_FORMAT_ENCODING)  # may be called with arguments
DATACLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    _StorageInfo,
)  # may be created and given attributes
ALLOWED = {
    **{f"{item.__module__}.{item.__qualname__}": item for item in (*CALLABLE, *DATACLASSES)},
    "pathlib.PosixPath": PosixPath,
    "torch.strided": torch.strided,
    **{f"torch.{name}": dtype for name, dtype in inert_pickle.DTYPES.items()},
}  # by the name in a pickle


class MetadataUnpickler(RestrictedUnpickler):
    """Unpickler that loads ALLOWED only, and sets attributes of new instances of DATACLASSES only.

    Raises UnpicklingError for anything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        path = f"{MOVED_MODULES.get(module, module)}.{name}"
        if path not in ALLOWED:
            raise RefusedPickleError(f"{printable(path)} is not allowed in the metadata of a checkpoint")
        return ALLOWED[path]

    def call(self, function: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        if not any(function is allowed for allowed in (*CALLABLE, *DATACLASSES)):
            raise RefusedPickleError("the metadata calls a function that is not allowed")
        return function(*arguments, **named)

    def create(self, cls: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        if not any(cls is allowed for allowed in (*CALLABLE, *DATACLASSES)) or not isinstance(cls, type):
            raise RefusedPickleError("the metadata creates an object of a class that is not allowed")
        return cls.__new__(cls, *arguments, **named)

    def set_state(self, target: Any, state: Any) -> None:
        has_setstate = "__setstate__" in vars(type(target))
        if type(target) not in DATACLASSES or not (has_setstate or isinstance(state, dict)):
            raise RefusedPickleError(f"{type(target).__name__} must not be given attributes")
        if has_setstate:
            target.__setstate__(state)
        else:
            vars(target).update(state)


class RestrictedReader(FileSystemReader):
    """FileSystemReader that loads the metadata once, with MetadataUnpickler, and reads files of its folder only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if not hasattr(self, "metadata"):
            file = Path(self.path) / METADATA
            if not file.is_file() or file.stat().st_size > MAX_METADATA_BYTES:
                raise pickle.UnpicklingError("the metadata is not a regular file of a plausible size")
            metadata = MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
            if not isinstance(metadata, Metadata):
                raise pickle.UnpicklingError("the metadata does not describe a checkpoint")
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            self.check_storage(metadata)
            self.metadata = metadata
        return self.metadata

    def check_storage(self, metadata: Metadata) -> None:
        """Check that stored data lies within regular files of the folder. Raises UnpicklingError otherwise."""
        sizes: dict[str, int] = {}
        for info in metadata.storage_data.values():
            name = info.relative_path
            if not isinstance(name, str) or name != PurePosixPath(name).name or name in ("", ".", ".."):
                raise pickle.UnpicklingError(f"{name!r} is not the name of a file of the checkpoint")
            if name not in sizes:
                file = Path(self.path) / name
                if not file.is_file():
                    raise pickle.UnpicklingError(f"{name} is missing, or is not a regular file")
                sizes[name] = file.stat().st_size
            if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
                raise pickle.UnpicklingError(f"{name} is truncated, or the metadata is damaged")
        stored = sum(sizes.values())
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        for key, entry in tensors.items():
            if entry.size.numel() * entry.properties.dtype.itemsize > stored or min(entry.size, default=0) < 0:
                raise pickle.UnpicklingError(f"{key} would be larger than the files that hold it")

    @property
    def entries(self) -> dict[str, Any]:
        """Metadata of each stored tensor or object, by key."""
        return self.read_metadata().state_dict_metadata

    def path_of(self, key: str) -> list[str | int]:
        """Return the keys and indices that an entry was nested in, or its first word and the rest if none are."""
        paths = self.read_metadata().planner_data
        path = paths.get(key) if isinstance(paths, dict) else None
        if isinstance(path, tuple | list) and path:
            return [part if isinstance(part, int) else str(part) for part in path]
        return [*key.split(".", 1)]

    def read_value(self, key: str) -> Any:
        """Return the unsharded tensor, or the object, that is stored under `key`."""
        with raise_value_error(Path(self.path)):
            entry = self.entries[key]
            is_tensor = isinstance(entry, TensorStorageMetadata)
            state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) if is_tensor else None}
            load(state, storage_reader=self, planner=WeightsOnlyPlanner(flatten_state_dict=False), no_dist=True)
            return state[key]


class WeightsOnlyPlanner(DefaultLoadPlanner):
    """Load planner that reads objects other than tensors, such as the step, without running code."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = inert_pickle.load_archive(value)


def read_training_state(path: Path) -> dict[str, Any]:
    """Read everything into memory, nested as it was saved.

    Raises ValueError for a directory that is not a checkpoint, is damaged, or names code.
    """
    with raise_value_error(path):
        reader = RestrictedReader(path)
        content: dict[str | int, Any] = {}
        for key in reader.entries:
            *folders, name = reader.path_of(key)
            target = content
            for folder in folders:
                target = target.setdefault(folder, {})
                if not isinstance(target, dict):
                    raise pickle.UnpicklingError(f"{key} is within another entry")
            target[name] = reader.read_value(key)
        return {str(name): with_lists(value) for name, value in content.items()}


def with_lists(value: Any) -> Any:
    """Return nested dictionaries with those whose keys are the indices of a list, 0 to n - 1, as that list."""
    if not isinstance(value, dict):
        return value
    items = {name: with_lists(item) for name, item in value.items()}
    if all(isinstance(name, int) for name in items) and sorted(items) == list(range(len(items))):
        return [items[index] for index in range(len(items))]
    return {str(name): item for name, item in items.items()}


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
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        cause = f" ({error})" if isinstance(error, pickle.UnpicklingError) else ""
        raise ValueError(
            f"{path}: cannot be read; it is not a torch.distributed.checkpoint directory, or it is damaged{cause}"
        ) from error
