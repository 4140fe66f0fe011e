"""Recognition of the parts of a training checkpoint: weights, EMA weights, optimizer and step.

Trainers name them differently: {"model", "ema", "opt"}, {"model_state_dict", "optimizer_state_dict"}, {"state_dict",
"optimizer_states", "global_step"} and many more. A name is understood by its words, an EMA also by its content. Parts
that are within other entries are brought to the outside by `nesting`, and one state dictionary may have the weights and
their EMA, as {"online_model.NAME", "ema_model.NAME"} has. Everything else is listed as unused, and refused if it looks
like training state.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from conversion.reading.names import EMA, MODEL, OPTIMIZER, PARAMETER, STEP, STEPS, bare_name, kind_of, snake_case
from conversion.reading.nesting import FOLDER, flattened
from conversion.reading.state_dicts import (
    find_optimizer,
    find_state,
    floating_tensors,
    is_average,
    is_foreign,
    is_list_of_tensors,
    is_number,
    is_state,
    split,
)
from conversion.reading.transformer_engine import without_extra_states
from pixart.checkpoint.inert import Inert, as_value, describe

MANY = 8  # tensors that make an unknown entry look like training state
SHARE = 0.1  # of the model's values, which do so too
FLAT_PARAMETERS = ("_flat_param", "flat_param")  # ends of FSDP's names of flattened parameters
STATE_FOLDERS = ("meta", "trainer", "trainer_state", "train_state", "state", "progress")  # entries that may have a step


@dataclass(kw_only=True)
class Parts:
    """Parts of a checkpoint under the file's parameter names; `unused` names the entries that are in none of them."""

    model: Mapping[str, Any] = field(default_factory=dict)
    ema: Mapping[str, Any] | Sequence[Any] | None = None  # a sequence is in the order of the model's parameters
    optimizer: Mapping[str, Any] | None = None
    step: Any = None
    step_name: str | None = None  # None if no entry is a step
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """An entry that may be a part, and the names of what stands beside the part within the entry."""

    name: str
    value: Any
    beside: list[str] = field(default_factory=list)

    @property
    def has_parameters(self) -> bool:
        """Whether it has a parameter that every model has; a list of tensors is assumed to."""
        return not isinstance(self.value, Mapping) or any(bare_name(str(key)) == PARAMETER for key in self.value)


def find_parts(content: Mapping[Any, Any], path: Path, *, ignore_unknown: bool = False) -> Parts:
    """Find the parts of a checkpoint's content.

    Raises ValueError if there are no weights, or, unless `ignore_unknown`, if there are two candidates for a part or
    an entry looks like training state and is not understood.
    """
    entries = {str(key): as_value(value) for key, value in content.items()}
    values = without_extra_states(entries).values()
    if is_state(entries) and all(isinstance(value, Tensor) for value in values):
        model, ema, unused = split(entries)
        return Parts(model=model or ema, ema=ema if model else None, unused=unused)
    entries = flattened(entries)
    check_modules(entries, path)
    parts, taken = Parts(), set()
    candidates = find_candidates(entries, path)
    for kind in (MODEL, EMA, OPTIMIZER):
        part = choose(kind, candidates[kind], path, ignore_unknown=ignore_unknown)
        if part is not None:
            taken.add(part.name)
            take(parts, kind, part)
            refuse_modules(parts, kind, part.name, path, ignore_unknown=ignore_unknown)
    if not parts.model:
        listed = ", ".join(f"{name!r} ({describe(value)})" for name, value in list(entries.items())[:5])
        raise ValueError(
            f"{path} is not a training checkpoint: it has no entry 'model' with named tensors; its entries are "
            f"{listed or 'none'}"
        )
    entries = with_nested_step(entries)
    parts.step_name = find_step(entries)
    if parts.step_name is not None:
        parts.step = entries[parts.step_name]
        taken.add(parts.step_name)
    unknown = {name: value for name, value in entries.items() if name not in taken}
    if not ignore_unknown:
        refuse_training_state(unknown, parts, path)
    parts.unused += unknown
    return parts


def check_modules(entries: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError if a part is a whole module that was saved, whose class is not loaded, or is flattened."""
    for name, value in entries.items():
        keys = map(str, value) if isinstance(value, Mapping) else ()
        if flat := next((key for key in keys if key.endswith(FLAT_PARAMETERS)), None):
            raise ValueError(
                f"{path}: {name!r} has parameters that FSDP has flattened ({flat!r}), which have lost their names; "
                "save it with StateDictType.FULL_STATE_DICT, or by torch.distributed.checkpoint"
            )
        is_module = isinstance(value, Inert) and isinstance(value.state, Mapping) and "_modules" in value.state
        if is_module and kind_of(name.rpartition(FOLDER)[2]) in (MODEL, EMA):
            raise ValueError(
                f"{path}: {name!r} is a whole module, {value.path}, whose class is not loaded; save its state_dict()"
            )


def find_candidates(entries: Mapping[str, Any], path: Path) -> dict[str, list[Candidate]]:
    """Return the candidates for each part by their names.

    Raises ValueError if an entry with the original training's name of a part is not that part.
    """
    candidates: dict[str, list[Candidate]] = {MODEL: [], EMA: [], OPTIMIZER: []}
    for name, value in entries.items():
        kind = kind_of(name.rpartition(FOLDER)[2]) or (EMA if is_average(value) else None)
        if kind == OPTIMIZER:
            if (optimizer := find_optimizer(value)) is not None:
                candidates[kind].append(Candidate(name=name, value=optimizer[0]))
            elif name == OPTIMIZER and value:
                raise ValueError(f"{path}: {name!r} is not a state dict of AdamW but {describe(value)}")
        elif kind in (MODEL, EMA):
            state = find_state(value, allow_list=kind == EMA)
            if state and (name == kind or is_state(state[0]) or is_list_of_tensors(state[0])):
                candidates[kind].append(Candidate(name=name, value=state[0], beside=state[1]))
            elif name == EMA and value is not None and value != {}:
                raise ValueError(f"{path}: {name!r} does not hold named tensors")
    return candidates


def choose(kind: str, candidates: list[Candidate], path: Path, *, ignore_unknown: bool) -> Candidate | None:
    """Return the only candidate for a part, if any. Raises ValueError for several, unless `ignore_unknown`."""
    if len(candidates) > 1 and kind != OPTIMIZER:
        candidates = [item for item in candidates if item.has_parameters] or candidates
    if len(candidates) > 1 and not ignore_unknown:
        raise ValueError(
            f"{path}: {candidates[0].name!r} and {candidates[1].name!r} may both be {kind!r}; remove one of them, or "
            "give --ignore-unknown to read the first"
        )
    return candidates[0] if candidates else None


def take(parts: Parts, kind: str, part: Candidate) -> None:
    """Set a part, and list what is beside it as unused."""
    unused = list(part.beside)
    if kind == OPTIMIZER:
        parts.optimizer = part.value
    elif not isinstance(part.value, Mapping):
        parts.ema = part.value
    else:
        online, average, counters = split(part.value)
        unused += counters
        if kind == MODEL:
            parts.model, parts.ema = (online, average or None) if online else (average, None)
        else:
            parts.ema = average or online
            unused += online if average else ()
    parts.unused += [f"{part.name}.{name}" for name in unused]


def refuse_modules(parts: Parts, kind: str, name: str, path: Path, *, ignore_unknown: bool) -> None:
    """Raise ValueError for weights of other modules, such as a VAE, within a part; if `ignore_unknown`, leave them out.

    Lightning saves all modules in one state dictionary.
    """
    state = parts.model if kind == MODEL else parts.ema
    if kind == OPTIMIZER or not isinstance(state, Mapping):
        return
    foreign = [key for key in state if is_foreign(key)]
    if not foreign or len(foreign) == len(state):
        return
    if not ignore_unknown:
        raise ValueError(
            f"{path}: {name!r} has {len(foreign)} tensors that the model does not have, for example {foreign[0]!r}; "
            "remove them, or give --ignore-unknown to read the rest"
        )
    kept = {key: value for key, value in state.items() if key not in set(foreign)}
    parts.unused += [f"{name}.{key}" for key in foreign]
    if kind == MODEL:
        parts.model = kept
    else:
        parts.ema = kept


def find_step(entries: Mapping[str, Any]) -> str | None:
    """Return the name of the step: that which comes first in STEPS among those of numbers."""
    named = {snake_case(name.rpartition(FOLDER)[2]): name for name in entries}
    return next(
        (named[word] for word in STEPS if word in named and (word == STEP or is_number(entries[named[word]]))), None
    )


def with_nested_step(entries: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with the step that one of STATE_FOLDERS has, if none of them is one."""
    for name in STATE_FOLDERS:
        value = entries.get(name)
        inner = {str(key): as_value(item) for key, item in value.items()} if isinstance(value, Mapping) else {}
        if find_step(entries) is None and (step := find_step(inner)) is not None:
            entries = {**entries, f"{name}{FOLDER}{step}": inner[step]}
    return entries


def refuse_training_state(unknown: Mapping[str, Any], parts: Parts, path: Path) -> None:
    """Raise ValueError for an unknown entry with many tensors, or with an optimizer's state."""
    size = sum(value.numel() for value in parts.model.values() if isinstance(value, Tensor))
    for name, value in unknown.items():
        tensors = list(floating_tensors(value))
        is_large = len(tensors) >= MANY or sum(tensor.numel() for tensor in tensors) > SHARE * size
        if is_large or (tensors and find_optimizer(value) is not None):
            raise ValueError(
                f"{path}: {name!r} looks like training state ({describe(value)} with {len(tensors)} tensors) and is "
                "not understood; rename it to model, model_ema or optimizer, or give --ignore-unknown to read the rest"
            )
