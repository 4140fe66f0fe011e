"""Parts of a checkpoint within other entries, or beside an optimizer's state, and values of many classes."""

import collections
import datetime
import decimal
import enum
import fractions
import pathlib
import random
import uuid
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from conversion.reading import formats
from pixart.model.dit import DiT
from tests.conversion.reading.test_world import (
    Content,
    Writer,
    beside,
    check_refused,
    check_same,
    flat_optimizer,
    lightning,
    parameters,
    prefixed,
)
from tests.support.checkpoints import CONFIG, legacy_content


@pytest.fixture
def content(stage1) -> Content:
    return legacy_content(stage1, prefix="")


def one_group(content: Content) -> Content:
    """Return the content with AdamW over all parameters in one group, as `AdamW(model.parameters())` has."""
    from pixart.model.dit import parameter_groups

    decayed, undecayed = parameter_groups(DiT(**CONFIG))
    by_name = dict(zip(decayed + undecayed, content["optimizer"]["state"].values(), strict=True))
    names = [name for name, _ in DiT(**CONFIG).named_parameters()]
    state = {index: by_name[name] for index, name in enumerate(names)}
    return {**content, "optimizer": {"state": state, "param_groups": [{"params": list(range(len(names)))}]}}


def without_average(content: Content) -> Content:
    return {**lightning(content), "state_dict": prefixed(content["model"], "model.")}


def nemo(content: Content) -> Content:
    ema = tuple(parameters(content["model_ema"]).values())
    state = {"optimizer": content["optimizer"], "ema": ema, "current_step": 8, "decay": 0.999}
    return {**without_average(content), "optimizer_states": [state]}


def callback(name: str, ema: Content) -> Content:
    return {"EMACallback": {name: prefixed(ema, "model."), "decay": 0.999}}


def in_place_of_ema(**entries: Any) -> Writer:
    return lambda content: {
        **{part: content[part] for part in ("model", "optimizer", "step")},
        **{name: make(content["model_ema"]) for name, make in entries.items()},
    }


NESTED: dict[str, Writer] = {
    "one group": one_group,
    "EMA of a callback": lambda content: {
        **without_average(content),
        "callbacks": callback("ema_state_dict", content["model_ema"]),
    },
    "EMA weights of a callback": lambda content: {
        **without_average(content),
        "callbacks": callback("ema_weights", content["model_ema"]),
    },
    "EMA beside the optimizer's state": nemo,
    "EMA of another name, by its content": in_place_of_ema(
        custom=lambda ema: {"decay": 0.9, "shadow_params": list(parameters(ema).values())}
    ),
    "AveragedModel of another name": in_place_of_ema(
        custom=lambda ema: {"n_averaged": torch.tensor(3), **prefixed(ema, "module.")}
    ),
    "EMA with a number of steps": in_place_of_ema(
        ema_state_dict=lambda ema: {"steps": torch.tensor(8), **prefixed(ema, "module.")}
    ),
    "EMA within other state": in_place_of_ema(extra_state=lambda ema: {"a": {"ema": ema}, "b": 1}),
}


@pytest.mark.parametrize("name", NESTED)
def test_nested_parts(stage1, content, tmp_path, name):
    torch.save(NESTED[name](content), tmp_path / "c.pt")
    check_same(formats.read(tmp_path / "c.pt", base_latent_size=8), stage1)


def test_weights_without_a_folder(stage1, content, tmp_path):
    """As torchtitan saves them, in a file and by torch.distributed.checkpoint."""
    state = {**content["model"], "optimizer": flat_optimizer(content["optimizer"])}
    state |= {"train_state": {"step": torch.tensor(8)}, "lr_scheduler": {"last_epoch": 8}}
    torch.save(state, tmp_path / "c.pt")
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name in ("c.pt", "dcp"):
        read = formats.read(tmp_path / name, base_latent_size=8)
        assert read.step == 8
        assert all(torch.equal(read.model[key], stage1.model[key]) for key in stage1.model)
        assert all(torch.equal(read.optimizer[key], stage1.optimizer[key]) for key in stage1.optimizer)


def test_a_step_within_an_entry(content, tmp_path):
    state = {"model": content["model"], "ema": content["model_ema"], "meta": {"iter": 8, "time": "now"}}
    torch.save(state, tmp_path / "c.pt")
    assert formats.read(tmp_path / "c.pt", base_latent_size=8).step == 9


def test_an_average_in_order_of_a_file_that_is_sorted_by_name(stage1, content, tmp_path):
    """The order of the parameters is that of the model, and not that of the file."""
    ema = list(parameters(content["model_ema"]).values())
    content |= {"model": dict(sorted(content["model"].items())), "model_ema": {"shadow_params": ema}}
    torch.save(content, tmp_path / "c.pt")
    check_same(formats.read(tmp_path / "c.pt", base_latent_size=8), stage1)


REFUSED: dict[str, tuple[Writer, str]] = {
    "flattened": (
        lambda content: {"model": {"_fsdp_wrapped_module._flat_param": torch.zeros(99)}},
        "parameters that FSDP has flattened",
    ),
    "master weights": (
        lambda content: {
            **content,
            "optimizer": {**content["optimizer"], "master_weights": list(content["model"].values())},
        },
        "'optimizer/master_weights' looks like training state",
    ),
    "list": (lambda content: [content["model"], 3], "it holds a list of dict, int"),
    "tensor": (lambda content: torch.zeros(3), "it holds a tensor of 3 values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_its_cause(content, tmp_path, name):
    write, cause = REFUSED[name]
    torch.save(write(content), tmp_path / "c.pt")
    check_refused(tmp_path / "c.pt", cause)


class Color(enum.Enum):
    """Setting of a training script."""

    RED = 1


class Schedule:
    """Object of a training script that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


Point = collections.namedtuple("Point", "x y")
VALUES = {
    "datetime": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    "timedelta": datetime.timedelta(1),
    "enum": Color.RED,
    "uuid": uuid.uuid4(),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "Windows path": pathlib.PureWindowsPath("C:/a"),
    "namedtuple": Point(1, 2),
    "deque": collections.deque([1, 2], 3),
    "counter": collections.Counter("abc"),
    "object": Schedule(),
    "NumPy generator": np.random.default_rng(0),
    "RandomState": np.random.RandomState(0),
    "Python's generator": random.Random(0),
    "NumPy structure": np.zeros(2, dtype=[("a", "f4")]),
    "NumPy objects": np.array([None, {}], dtype=object),
    "NumPy time": np.datetime64("2020-01-01"),
    "torch.Generator": torch.Generator(),
    "torch.Generator's state": torch.Generator().get_state(),
    "sparse tensor": torch.eye(3).to_sparse(),
    "FP8 tensor": torch.zeros(3).to(torch.float8_e4m3fn),
    "meta tensor": torch.empty(3, device="meta"),
    "dtype": torch.float32,
    "exception": ValueError("a"),
    "complex": 3 + 4j,
    "bytes": b"\xff",
    "slice": slice(1, 2),
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_parts(stage1, content, tmp_path, name):
    torch.save(beside(value=VALUES[name])(content), tmp_path / "c.pt")
    read = formats.read(tmp_path / "c.pt", base_latent_size=8)
    check_same(read, stage1)
    assert read.provenance["unused_entries"]["names"] == ["value"]


def views(state: Content) -> Content:
    """Return the tensors as views of one storage."""
    flat, offset, result = torch.cat([tensor.reshape(-1) for tensor in state.values()]), 0, {}
    for name, tensor in state.items():
        result[name] = flat[offset : offset + tensor.numel()].view(tensor.shape)
        offset += tensor.numel()
    return result


def transposed(state: Content) -> Content:
    return {name: item.t().contiguous().t() if item.ndim == 2 else item for name, item in state.items()}


LAYOUTS = {
    "views": views,
    "not contiguous": transposed,
    "float64": lambda state: {name: tensor.double() for name, tensor in state.items()},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("is_archive", [True, False])
def test_tensors_of_other_layouts(stage1, content, tmp_path, name, is_archive):
    content["model"] = LAYOUTS[name](content["model"])
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=is_archive)
    check_same(formats.read(tmp_path / "c.pt", base_latent_size=8), stage1)


def test_mixed_precision(stage1, content, tmp_path):
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    names = list(content["model"])
    content["model"] = {name: content["model"][name].to(dtypes[row % 3]) for row, name in enumerate(names)}
    torch.save(content, tmp_path / "c.pt")
    read = formats.read(tmp_path / "c.pt", base_latent_size=8)
    for row, name in enumerate(names):
        assert torch.equal(read.model[name], stage1.model[name].to(dtypes[row % 3]).float())
