"""Reading of DeepSpeed's checkpoints, whose optimizer is partitioned over the ranks (ZeRO).

The files of the ranks have the parameters in float32 and their moments as flat vectors. `param_shapes` of the model's
file says which parameters they hold, in their order. In stages 1 and 2 the vectors of all ranks make a group of
parameters, one after the other; in stage 3 each parameter is divided over the ranks, and padded.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversion.reading.folders.layout import MODEL_STATES, PARTITIONED_MODEL_STATES
from pixart.checkpoint.inert import as_value
from pixart.training.optimizer import MOMENTS

OPTIMIZER_STATES = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
FP32 = "fp32"  # the vector of the parameters themselves
Load = Callable[[Path], Any]


def read(folder: Path, load: Load) -> dict[str, Any]:
    """Return the parts of a checkpoint, as one file would have them: weights in float32, moments by name.

    `load` loads a file. Raises ValueError if files are missing or do not fit each other.
    """
    path = next(folder / name for name in (MODEL_STATES, PARTITIONED_MODEL_STATES) if (folder / name).is_file())
    if list(folder.glob("*mp_rank_01_model_states.pt")):
        raise ValueError(f"{folder}: its weights are divided over several ranks (tensor parallelism); merge them first")
    content = load(path)
    if not isinstance(content, Mapping) or not isinstance(module := as_value(content.get("module")), Mapping):
        raise ValueError(f"{path}: has no entry 'module' with named tensors; it is not from DeepSpeed, or is damaged")
    entries = {str(key): value for key, value in content.items()}
    files = {int(match[1]): file for file in folder.iterdir() if (match := OPTIMIZER_STATES.fullmatch(file.name))}
    if not files:
        return entries
    ranks = [_state_of(files[rank], load) for rank in sorted(files)]
    counts = as_value(ranks[0].get("partition_count", len(ranks)))
    count = max(counts) if isinstance(counts, list | tuple) and counts else counts
    if count != len(ranks) or sorted(files) != list(range(len(ranks))):
        raise ValueError(f"{folder}: has the optimizer of {len(ranks)} ranks of {count}; copy the complete checkpoint")
    shapes = _shapes_of(content.get("param_shapes"), path)
    try:
        split = _divided if "fp32_flat_groups" in ranks[0] else _consecutive
        fields = {field: split(ranks, shapes, field) for field in (FP32, *MOMENTS)}
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder}: the files of the ranks do not fit the shapes of the parameters: {error}") from None
    steps = _steps_of(ranks[0])
    weights = {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)} | fields[FP32]
    state = {
        name: {"step": steps, **{field: fields[field][name] for field in MOMENTS}} for name in fields[FP32]
    }  # every parameter has the same number of steps
    return {**entries, "module": weights, "optimizer": {"state": state}}


def _state_of(path: Path, load: Load) -> Mapping[str, Any]:
    content = load(path)
    state = as_value(content.get("optimizer_state_dict")) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: has no entry 'optimizer_state_dict'; it is not from DeepSpeed, or is damaged")
    return state


def _shapes_of(stored: Any, path: Path) -> list[dict[str, tuple[int, ...]]]:
    groups = [stored] if isinstance(stored, Mapping) else stored
    if not isinstance(groups, list | tuple) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError(f"{path}: has no shapes of the parameters ('param_shapes'), which the optimizer's files need")
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]


def _moments_of(rank: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Return the optimizer's state of each group on a rank."""
    base = as_value(rank["optimizer_state_dict"] if "fp32_flat_groups" in rank else rank["base_optimizer_state"])
    if isinstance(base, Mapping):
        state = as_value(base["state"])
        return [as_value(state[index]) for index in sorted(state)]
    return [as_value(item) for item in base]


def _steps_of(rank: Mapping[str, Any]) -> Any:
    step = _moments_of(rank)[0].get("step", rank.get("base_optimizer_state_step"))
    if isinstance(step, Tensor):
        step = step.item()
    return torch.tensor(float(step or 0))


def _vectors(rank: Mapping[str, Any], field: str) -> list[Tensor]:
    """Return the flat vectors of a rank by group."""
    if field != FP32:
        return [group[field] for group in _moments_of(rank)]
    return list(rank["fp32_flat_groups" if "fp32_flat_groups" in rank else "single_partition_of_fp32_groups"])


def _consecutive(
    ranks: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, tuple[int, ...]]], field: str
) -> dict[str, Tensor]:
    """Split the vectors of stages 1 and 2, whose ends are padding."""
    by_rank = [_vectors(rank, field) for rank in ranks]
    tensors: dict[str, Tensor] = {}
    for index, shapes in enumerate(groups):
        flat = torch.cat([vectors[index].reshape(-1) for vectors in by_rank])
        offset = 0
        for name, shape in shapes.items():
            tensors[name] = flat[offset : offset + math.prod(shape)].reshape(shape)
            offset += math.prod(shape)
    return tensors


def _divided(
    ranks: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, tuple[int, ...]]], field: str
) -> dict[str, Tensor]:
    """Join the parts of stage 3, in which every parameter is divided over the ranks."""
    flat = [torch.cat([vector.reshape(-1) for vector in _vectors(rank, field)]) for rank in ranks]
    tensors: dict[str, Tensor] = {}
    offset = 0
    for name, shape in ((name, shape) for shapes in groups for name, shape in shapes.items()):
        size = -(-math.prod(shape) // len(ranks))
        joined = torch.cat([vector[offset : offset + size] for vector in flat])
        tensors[name] = joined[: math.prod(shape)].reshape(shape)
        offset += size
    return tensors
