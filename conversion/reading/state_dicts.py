"""State dictionaries within the content of a checkpoint: of models, of their EMA and of optimizers."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from conversion.reading.names import EMA, EMA_MODULES, MODEL, ONLINE_MODULES, PARAMETER, bare_name, kind_of
from conversion.reading.transformer_engine import parameter_names
from pixart.checkpoint.inert import Inert, as_value

SHADOWS = ("shadow_params", "shadow", "params")  # entries that have the tensors of an EMA
COUNTERS = frozenset(("n_averaged", "initted", "step", "steps", "decay", "num_updates", "optimization_step"))


def is_state(value: Any) -> bool:
    """Return whether a value is a state dictionary: a mapping with a tensor of at least one dimension."""
    return isinstance(value, Mapping) and any(
        isinstance(item := as_value(element), Tensor) and item.ndim > 0 for element in value.values()
    )


def find_state(value: Any, *, allow_list: bool = False) -> tuple[Any, list[str]] | None:
    """Return the state dictionary or the list of tensors that an entry has, and the names that are beside it."""
    if allow_list and is_list_of_tensors(value):
        return value, []
    if not isinstance(value, Mapping) or not value:
        return None
    inner = {str(key): as_value(item) for key, item in value.items()}
    for name, item in inner.items():
        is_named = name in SHADOWS or kind_of(name) in (MODEL, EMA)
        if is_named and (is_state(item) or (allow_list and is_list_of_tensors(item))):
            return item, [key for key in inner if key != name]
    return value, []


def is_list_of_tensors(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(as_value(item), Tensor) for item in value)
    )


def split(state: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the weights, the EMA weights and the names of the values that are neither, of one state dictionary.

    The latter are numbers such as AveragedModel's `n_averaged`.
    """
    model: dict[str, Any] = {}
    ema: dict[str, Any] = {}
    rest = []
    has_parameters = any(bare_name(str(key)) == PARAMETER for key in state)
    for key, item in state.items():
        name, value = str(key), as_value(item)
        modules = name.split(".")[:-1]
        if has_parameters and name.split(".")[-1] in COUNTERS and is_number(value):
            rest.append(name)
        elif EMA_MODULES & set(modules) and not ONLINE_MODULES & set(modules):
            ema[name] = value
        else:
            model[name] = value
    return model, ema, rest


def is_foreign(key: str) -> bool:
    """Return whether a key is that of another module than this suite's model, such as a VAE."""
    module, _, name = bare_name(key).partition(".")
    return bool(name) and module not in {item.partition(".")[0] for item in parameter_names()}


def is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def is_average(value: Any) -> bool:
    """Return whether a value is an EMA by its content: that of diffusers, ema_pytorch or AveragedModel."""
    if not isinstance(value, Mapping):
        return False
    names = [str(key) for key in value]
    has_parameters = any(bare_name(name) == PARAMETER for name in names)
    return is_list_of_tensors(as_value(value.get(SHADOWS[0]))) or (
        has_parameters and any(name == "n_averaged" or name.startswith("ema_model.") for name in names)
    )


def find_optimizer(value: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return {"state", "param_groups"} of an optimizer's state dictionary, nested or flat, and what is beside it.

    None if there is no such dictionary, or if there are several.
    """
    if isinstance(value, list | tuple) and len(value) == 1:  # Lightning has a list
        value = as_value(value[0])
    if not isinstance(value, Mapping):
        return None
    if is_optimizer(value):
        beside = {str(name): item for name, item in value.items() if name not in ("state", "param_groups")}
        return {name: item for name, item in value.items() if str(name) not in beside}, beside
    inner = {str(name): as_value(item) for name, item in value.items()}
    if len(optimizers := [name for name, item in inner.items() if is_optimizer(item)]) == 1:
        optimizer = find_optimizer(inner.pop(optimizers[0]))
        return (optimizer[0], {**optimizer[1], **inner}) if optimizer else None
    state: dict[str, dict[str, Any]] = {}
    for key, item in value.items():
        if str(key).startswith("state."):  # as `flatten_optimizer_state_dict` writes it
            name, _, name_of_field = str(key).removeprefix("state.").rpartition(".")
            state.setdefault(name, {})[name_of_field] = as_value(item)
    return ({"state": state}, {}) if state else None


def is_optimizer(value: Any) -> bool:
    """Return whether a value is a state dictionary of an optimizer."""
    if not isinstance(value, Mapping) or not isinstance(state := as_value(value.get("state")), Mapping):
        return False
    return all(isinstance(as_value(item), Mapping) for item in state.values()) and (
        bool(state) or "param_groups" in value
    )


def floating_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of at least one dimension within a value."""
    pending, seen = [value], set()
    while pending:
        item = as_value(pending.pop())
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.is_floating_point() and item.ndim:
                yield item
        elif isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            pending += item
        elif isinstance(item, Inert):
            pending += [item.arguments, item.state, item.elements]
