"""Mapping of a stored optimizer state to AdamW's state by parameter name.

`AdamW.state_dict()` numbers the parameters through the group with weight decay, then the group without, each in the
order of `named_modules()`; those of a single group are in the order of `parameters()`. The original training exempts
biases, `nn.LayerNorm`, `nn.RMSNorm` and `nn.Embedding`. TransformerEngine's RMSNorm is no subclass of `nn.RMSNorm`, so
that its weights are in the group with weight decay; the number of parameters in the groups decides which of the two a
file has.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.reading.names import bare_names
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.model.dit import DiT, parameter_groups
from pixart.training.optimizer import MOMENTS

Q_NORM = ".q_norm.weight"


def name_moments(
    moments: Mapping[str, Any] | None, param_groups: Sequence[Any] | None, config: dict[str, Any], path: Path
) -> tuple[State, bool]:
    """Return AdamW's state by parameter name, and whether the norms of queries and keys had weight decay.

    The state is zero if the file has no optimizer. Parameters by index are named by `param_groups`; without these, the
    norms had none. Raises ValueError if the state does not fit the model's parameters.
    """
    with torch.device("meta"):
        model = DiT(**config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    fields = {field: shapes for field in MOMENTS} | {"step": dict.fromkeys(shapes, ())}
    if moments is None:
        return LazyTensors({f"{n}.{f}": zeros(shape[n]) for f, shape in fields.items() for n in shapes}), False
    stored = {name: moments[key] for name, key in bare_names(moments, f"{path}: optimizer").items()}
    count = len({key.rpartition(".")[0] for key in stored})
    if count != len(shapes):
        raise ValueError(f"{path}: the optimizer has state for {count} parameters, the model has {len(shapes)}")
    if any(f"{name}.{MOMENTS[0]}" in stored for name in shapes):
        stored_key, decay_qk_norm = {name: name for name in shapes}, decays_qk_norm(param_groups)
    else:
        stored_key, decay_qk_norm = stored_indices(model, param_groups, path)
    state = {}
    for field, shape_of in fields.items():
        for name in shapes:
            tensor = stored.get(f"{stored_key[name]}.{field}")
            if field == "step" and isinstance(tensor, int | float):
                tensor = torch.tensor(float(tensor))
            if (
                not isinstance(tensor, Tensor)
                or tuple(tensor.shape) != shape_of[name]
                or (field in MOMENTS and not tensor.is_floating_point())
            ):
                actual = (
                    f"shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
                    if isinstance(tensor, Tensor)
                    else f"type {type(tensor).__name__}"
                )
                raise ValueError(
                    f"{path}: {field} of parameter {stored_key[name]} has {actual}; "
                    f"{name} needs a floating-point tensor of shape {shape_of[name]}"
                )
            state[f"{name}.{field}"] = tensor
    return state, decay_qk_norm


def stored_indices(model: DiT, param_groups: Sequence[Any] | None, path: Path) -> tuple[dict[str, str], bool]:
    """Return the index of each parameter in the stored state, and whether the norms of queries and keys had decay.

    Raises ValueError if the number of parameters in the groups is that of neither rule.
    """
    rules = {decay: parameter_groups(model, decay_qk_norm=decay) for decay in (False, True)}
    if param_groups is None:
        decayed, undecayed = rules[False]
        return {name: str(index) for index, name in enumerate(decayed + undecayed)}, False
    stored = [indices_of(group, path) for group in param_groups]
    names = [name for name, _ in model.named_parameters()]
    if [len(indices) for indices in stored] == [len(names)]:  # AdamW(model.parameters()), with one weight decay
        return {name: str(index) for name, index in zip(names, stored[0], strict=True)}, False
    for decay_qk_norm, groups in rules.items():
        if [len(indices) for indices in stored] == [len(group) for group in groups]:
            pairs = zip(chain(*groups), chain(*stored), strict=True)
            return {name: str(index) for name, index in pairs}, decay_qk_norm
    sizes = {decay: " and ".join(str(len(group)) for group in names) for decay, names in rules.items()}
    raise ValueError(
        f"{path}: the optimizer's param_groups have {' and '.join(str(len(indices)) for indices in stored) or 'no'} "
        f"parameters; this model needs {sizes[False]}, or {sizes[True]} if TransformerEngine's norms of queries and "
        "keys have weight decay"
    )


def decays_qk_norm(param_groups: Sequence[Any] | None) -> bool:
    """Return whether groups of named parameters, as FSDP saves them, have weight decay of the norms of queries."""
    return any(
        group.get("weight_decay", 0) != 0 and any(str(name).endswith(Q_NORM) for name in group.get("params", ()))
        for group in param_groups or ()
        if isinstance(group, Mapping)
    ) and any(isinstance(group, Mapping) and group.get("weight_decay", 0) == 0 for group in param_groups or ())


def indices_of(group: object, path: Path) -> list[int]:
    """Return the parameter indices of a group of `AdamW.state_dict()`. Raises ValueError for an empty group."""
    indices = group.get("params") if isinstance(group, Mapping) else None
    if not isinstance(indices, Sequence) or not all(isinstance(index, int) for index in indices):
        raise ValueError(f"{path}: 'param_groups' of the optimizer is not that of AdamW.state_dict(): a list of groups")
    return list(indices)


def zeros(shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Return a function that creates a float32 tensor of zeros, for `LazyTensors`."""
    return lambda: torch.zeros(shape)
