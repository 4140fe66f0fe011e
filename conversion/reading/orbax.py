"""Stage-1 checkpoints of the original JAX training: Orbax's StandardSave, read by tensorstore without jax.

Arrays are read one at a time when they are accessed, in float32; names, shapes and dtypes are checked before.
"""

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from conversion.options import BASE_LATENT_SIZE
from conversion.reading import equinox
from conversion.reading.moments import zeros
from conversion.reading.orbax_metadata import Item, read_items
from conversion.reading.training_state import (
    INFERRED,
    LEGACY_COND_DROPOUT_PROB,
    check_config,
    infer_config,
    original_normalization,
    validated,
)
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.lazy_tensors import LazyTensors
from pixart.model.dit import state_shapes
from pixart.training.optimizer import MOMENTS

SOURCE_FORMAT = "Orbax of the original JAX training"
# Groups of a state `(model, optimizer state)`, the latter that of optax.chain(clip_by_global_norm, adamw).
MODEL, FIRST, SECOND, COUNT, SCHEDULE_COUNT = "0", "1.1.0.mu", "1.1.0.nu", "1.1.0.count", "1.1.2.count"
FLOATS, INTEGERS = ("float32", "bfloat16"), ("int32", "int64")
# A trained array hardly compresses, and moments of zero vanish; arrays that claim more are a decompression bomb.
MAX_COMPRESSION = 64
CACHE_BYTES = 1 << 26  # of the database's nodes

Arrays = Mapping[str, Any]  # tensorstore.TensorStore by name


def read(path: Path, base_latent_size: int | None) -> Checkpoint:
    """Read a step, or one of its items, of a stage-1 checkpoint.

    Raises ValueError, with a message of one line, if it is damaged, is not that of a stage-1 model, or if tensorstore
    is not installed. An array that is damaged raises ValueError when it is accessed.
    """
    state_item, ema_item = read_items(path)
    names, arrays = group_names(state_item), open_arrays(state_item)
    groups = {group: {name: arrays[key] for name, key in keys.items()} for group, keys in names.items()}
    model = groups[MODEL]
    config = configuration(model, base_latent_size or BASE_LATENT_SIZE, state_item.folder)
    shapes = equinox.expected_shapes(state_shapes(config))
    trained = {name: shape for name, shape in shapes.items() if name not in equinox.BUFFERS}
    check_arrays(model, shapes, f"{state_item.folder}: weights")
    for group in groups.keys() - {MODEL}:
        check_arrays(groups[group], trained, f"{state_item.folder}: {group}")
    ema, ema_folder = model, state_item.folder
    if ema_item is not None:
        ema, ema_folder = open_arrays(ema_item), ema_item.folder
        check_arrays(ema, shapes, f"{ema_folder}: weights")
    step = read_count(arrays[COUNT], state_item.folder) if COUNT in arrays else 0
    dropped = sum(equinox.is_dropped(name) for name in shapes)
    return Checkpoint(
        stage=1,
        step=step,
        config=config,
        model=weights(model, config, state_item.folder),
        ema=weights(ema, config, ema_folder),
        optimizer=moments(groups, trained, config, step, state_item.folder),
        normalization=original_normalization(config["in_dim"]),
        provenance={
            "source": str(path),
            "source_format": SOURCE_FORMAT if COUNT in arrays else f"{SOURCE_FORMAT}, weights only",
            "source_config": INFERRED,
            "cond_dropout_prob": LEGACY_COND_DROPOUT_PROB[1],
            "dropped_tensors": {equinox.DROPPED_REASON: dropped} if dropped else {},
        },
    )


def open_arrays(item: Item) -> dict[str, Any]:
    """Open the arrays of an item without reading their values.

    Raises ValueError if tensorstore is not installed, or for an array that cannot be opened or claims too many bytes.
    """
    tensorstore = import_tensorstore(item.folder)
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr3" if item.use_zarr3 else "zarr",
                "kvstore": array_location(item, name),
                "fill_missing_data_reads": not item.stores_fill_values,
                "recheck_cached_data": False,
            },
            context=context,
            open=True,
            read=True,
        )
        for name in item.arrays
    }
    arrays = {name: wait(future, name, item.folder) for name, future in opening.items()}
    for name, array in arrays.items():
        chunk, shape = array.chunk_layout.read_chunk.shape or (), array.shape
        if any(length > max(size, 1) for length, size in zip(chunk, shape, strict=bool(chunk))):
            raise ValueError(f"{item.folder}: {name} has chunks that are larger than its shape {shape}; it is damaged")
    claimed_bytes = sum(math.prod(array.shape) * array.dtype.numpy_dtype.itemsize for array in arrays.values())
    if claimed_bytes > MAX_COMPRESSION * item.num_bytes:
        raise ValueError(
            f"{item.folder}: its arrays claim {claimed_bytes} bytes, its files have {item.num_bytes}; it is damaged"
        )
    return arrays


def import_tensorstore(folder: Path) -> ModuleType:
    """Import tensorstore. Raises ValueError with the command that installs it."""
    try:
        import tensorstore
    except ImportError as error:
        raise ValueError(
            f"{folder}: reading an Orbax checkpoint needs tensorstore; run "
            '`pip install "pixart-suite[jax-checkpoints]"`'
        ) from error
    return tensorstore


def array_location(item: Item, name: str) -> dict[str, Any]:
    """Return the key-value store of an array, as tensorstore's JSON."""
    base = {"driver": "file", "path": f"{item.folder.resolve()}/"}
    if item.use_ocdbt:
        return {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return {**base, "path": f"{base['path']}{name}/"}


def wait(future: Any, name: str, folder: Path) -> Any:
    """Return the result of one of tensorstore's operations. Raises ValueError if it failed."""
    try:
        return future.result()
    except Exception as error:  # tensorstore raises many types of exception for damaged files
        raise ValueError(
            f"{folder}: {name} cannot be read; the checkpoint is damaged or was not copied whole"
        ) from error


def group_names(item: Item) -> dict[str, dict[str, str]]:
    """Return the names of an item's arrays by parameter, for the groups MODEL, FIRST and SECOND.

    An item without an optimizer state has the group MODEL alone. Raises ValueError for arrays of other names.
    """
    if not any(name.startswith(f"{MODEL}.") for name in item.arrays):
        if not item.arrays or any(name.startswith("1.") for name in item.arrays):
            raise ValueError(f"{item.folder}: has no weights of a model; give the item 'state' or 'model_ema'")
        return {MODEL: {name: name for name in item.arrays}}
    groups: dict[str, dict[str, str]] = {MODEL: {}, FIRST: {}, SECOND: {}}
    for name in item.arrays:
        group = next((group for group in groups if name.startswith(f"{group}.")), None)
        if group is not None:
            groups[group][name.removeprefix(f"{group}.")] = name
        elif name not in (COUNT, SCHEDULE_COUNT):
            raise ValueError(
                f"{item.folder}: has the array {name}; allowed are a model and its state of "
                "optax.chain(clip_by_global_norm, adamw)"
            )
    if COUNT not in item.arrays:
        raise ValueError(
            f"{item.folder}: has no array {COUNT}, the number of optimizer steps; copy the checkpoint again"
        )
    return groups


def configuration(model: Arrays, base_latent_size: int, folder: Path) -> dict[str, Any]:
    """Infer the model's configuration from the shapes of its arrays. Raises ValueError if they make no model."""
    shapes = {equinox.suite_name(name): torch.empty(array.shape, device="meta") for name, array in model.items()}
    config = infer_config(shapes, base_latent_size, folder)
    config["qk_norm_eps"] = equinox.EPS
    if any(name.endswith(f"{equinox.Q_NORM}.bias") for name in model):
        config["qk_norm_bias"] = True
    if "num_classes" not in config or config["dim"] % 4 or config["cond_dim"] % 2:
        raise ValueError(f"{folder}: its arrays are not those of a stage-1 model of the original JAX training")
    check_config(config, folder)
    return config


def check_arrays(arrays: Arrays, expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise ValueError unless the arrays have exactly the expected names and shapes, and a floating-point dtype."""
    if missing := sorted(expected.keys() - arrays.keys()):
        raise ValueError(f"{name}: lack {len(missing)} arrays of the model, for example {missing[0]}")
    if unknown := sorted(arrays.keys() - expected.keys()):
        raise ValueError(f"{name}: have {len(unknown)} arrays that the model does not have, for example {unknown[0]}")
    for key, shape in expected.items():
        if tuple(arrays[key].shape) != shape:
            raise ValueError(f"{name}: {key} has shape {tuple(arrays[key].shape)}; the model requires {shape}")
        if arrays[key].dtype.name not in FLOATS:
            raise ValueError(f"{name}: {key} has dtype {arrays[key].dtype.name}; allowed are {' and '.join(FLOATS)}")


def read_count(array: Any, folder: Path) -> int:
    """Read the number of optimizer steps. Raises ValueError if it is not one non-negative integer."""
    count = int(wait(array.read(), COUNT, folder)) if array.shape == () and array.dtype.name in INTEGERS else -1
    if count < 0:
        raise ValueError(f"{folder}: {COUNT} is not a number of optimizer steps, an integer of at least 0")
    return count


def weights(arrays: Arrays, config: Mapping[str, Any], folder: Path) -> LazyTensors:
    """Return the weights in this suite's layout, without those that its model does not have."""
    return validated(
        LazyTensors(
            {
                equinox.suite_name(name): functools.partial(
                    lambda name: equinox.weight(name, read_tensor(arrays[name], name, folder), config), name
                )
                for name in arrays
                if not equinox.is_dropped(name)
            }
        ),
        f"{folder}: weights",
    )


def moments(
    groups: Mapping[str, Any],
    trained: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    step: int,
    folder: Path,
) -> LazyTensors:
    """Return AdamW's state by parameter name in this suite's layout; zeros if the item has weights only."""
    shapes = state_shapes(config)
    makers: dict[str, Callable[[], Tensor]] = {}
    for name in trained:
        if equinox.is_dropped(name):
            continue
        for order, (field, group) in enumerate(zip(MOMENTS, (FIRST, SECOND), strict=True), 1):
            makers[f"{name}.{field}"] = zeros(shapes[name])
            if group in groups:
                array = groups[group][name]
                makers[f"{name}.{field}"] = functools.partial(
                    lambda name, array, group, order: equinox.moment(
                        name, read_tensor(array, f"{group}.{name}", folder), config, order
                    ),
                    *(name, array, group, order),
                )
        makers[f"{name}.step"] = functools.partial(torch.tensor, float(step))
    return validated(LazyTensors(makers), f"{folder}: optimizer")


def read_tensor(array: Any, name: str, folder: Path) -> Tensor:
    """Read an array in float32. Raises ValueError if it cannot be read."""
    tensorstore = import_tensorstore(folder)
    values = wait(tensorstore.cast(array, tensorstore.float32).read(order="C"), name, folder)
    return torch.from_numpy(values)
