"""Parts of a checkpoint that are within other entries, brought to the outside under names such as `checkpoint/model`.

{"checkpoint": {"model": ..., "ema": ...}}                      one folder around all parts
{"patchify.weight": ..., "optimizer": ...}                      the weights' tensors without a folder, as torchtitan
{"callbacks": {"EMA": {"ema_state_dict": ...}}}                 an EMA within another entry, as Lightning's callbacks
{"optimizer_states": [{"optimizer": ..., "ema": [...]}]}        something beside an optimizer's state, as NeMo's EMA
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from conversion.reading.names import EMA, MODEL, OPTIMIZER, PARAMETER, bare_name, kind_of
from conversion.reading.state_dicts import find_optimizer, find_state, is_average, is_list_of_tensors, is_state
from pixart.checkpoint.inert import as_value

FOLDER = "/"  # between the name of an entry and that of the entry that it is nested in
MAX_DEPTH = 4  # of entries in which an EMA is searched for


def flattened(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a checkpoint with every part on the outside."""
    entries = with_current_weights(unnested(with_model(entries)))
    return with_averages(with_neighbors_of_optimizers(entries))


def with_model(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with the tensors of the weights in one entry, if they are among the entries themselves."""
    if has_weights(entries) or not any(bare_name(name) == PARAMETER for name in entries):
        return entries
    weights = {name: value for name, value in entries.items() if isinstance(value, Tensor) and "." in name}
    return {MODEL: weights, **{name: value for name, value in entries.items() if name not in weights}}


def unnested(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of the only part that has weights one level deeper, as {"checkpoint": {"model": ...}} has."""
    if has_weights(entries):
        return entries
    folders = {}
    for name, value in entries.items():
        inner = {str(key): as_value(item) for key, item in value.items()} if isinstance(value, Mapping) else {}
        if kind_of(name) != EMA and has_weights(inner):
            folders[name] = inner
    if len(folders) != 1:
        return entries
    [(folder, inner)] = folders.items()
    outer = {name: value for name, value in entries.items() if name != folder}
    return {**outer, **{f"{folder}{FOLDER}{name}": value for name, value in inner.items()}}


def has_weights(entries: Mapping[str, Any]) -> bool:
    """Return whether an entry has the name of a model's weights, and tensors."""
    return any(
        kind_of(name) == MODEL and (state := find_state(value)) and is_state(state[0])
        for name, value in entries.items()
    )


def with_current_weights(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with the averaged weights as EMA where Lightning's WeightAveraging saved the two swapped."""
    swapped = {"current_model_state": "state_dict", "state_dict": EMA}
    return (
        {swapped.get(name, name): value for name, value in entries.items()}
        if swapped.keys() <= entries.keys()
        else entries
    )


def with_neighbors_of_optimizers(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with what is beside an optimizer's state as entries of their own."""
    beside: dict[str, Any] = {}
    for name, value in entries.items():
        if kind_of(name.rpartition(FOLDER)[2]) == OPTIMIZER and (parts := find_optimizer(value)):
            beside |= {f"{name}{FOLDER}{key}": as_value(item) for key, item in parts[1].items()}
    return entries | beside


def with_averages(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with an EMA that is within one of another name as an entry of its own."""
    result: dict[str, Any] = {}
    for name, value in entries.items():
        rest, averages = value, dict[str, Any]()
        if kind_of(name.rpartition(FOLDER)[2]) is None and not is_average(value):
            rest, averages = lifted(value, name)
        result |= {name: rest, **averages}
    return result


def lifted(value: Any, name: str, depth: int = 0) -> tuple[Any, dict[str, Any]]:
    """Return a value without the EMA within it, and these by their names."""
    value = as_value(value)
    if not isinstance(value, Mapping) or depth > MAX_DEPTH:
        return value, {}
    rest, averages = {}, dict[str, Any]()
    for key, item in value.items():
        path, inner = f"{name}{FOLDER}{key}", as_value(item)
        if is_average(inner) or (kind_of(str(key)) == EMA and holds_parameters(inner)):
            averages[path] = inner
        else:
            rest[key], more = lifted(inner, path, depth + 1)
            averages |= more
    return (rest, averages) if averages else (value, {})


def holds_parameters(value: Any) -> bool:
    """Return whether a value has the parameters of a model, by name or in their order."""
    parts = find_state(value, allow_list=True)
    if parts is None:
        return False
    state = parts[0]
    return is_list_of_tensors(state) or (is_state(state) and any(bare_name(str(key)) == PARAMETER for key in state))
