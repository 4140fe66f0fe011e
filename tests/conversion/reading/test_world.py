"""Checkpoints as other trainers and libraries write them: the same state is read whatever its parts are called."""

import argparse
import functools
import json
import os
import pathlib
import random
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.optim.swa_utils import AveragedModel

from conversion.reading import formats
from conversion.to_fp8 import main
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT, parameter_groups
from tests.support.checkpoints import CONFIG, legacy_content

pytestmark = pytest.mark.slow

BUFFERS = ("time_proj.freqs", "pos_embed.div_term")
Content = dict[str, Any]
Writer = Callable[[Content], Content]


@dataclass
class ModelArguments:
    """Configuration of a training script, whose class the reader does not know."""

    width: int = 32

    class Inner:
        """Class within another, which protocol 2 of pickle names by `getattr`."""

    def double(self) -> int:
        return 2 * self.width


class EasyDict(dict):
    """Dictionary of a library that the reader does not know."""


def half(values: float) -> float:
    return values / 2


@pytest.fixture
def content(stage1) -> Content:
    return legacy_content(stage1, prefix="")


def renamed(state: Content, rename: Callable[[str], str]) -> Content:
    return {rename(name): tensor for name, tensor in state.items()}


def parameters(state: Content) -> Content:
    return {name: tensor for name, tensor in state.items() if name not in BUFFERS}


def prefixed(state: Content, prefix: str) -> Content:
    return renamed(state, lambda name: prefix + name)


def in_blocks(word: str) -> Callable[[str], str]:
    """Return a function that inserts `word` after the number of a block."""

    def rename(name: str) -> str:
        parts = name.split(".")
        return name if parts[0] != "dit_blocks" else ".".join([*parts[:2], word, *parts[2:]])

    return rename


def in_attention(name: str) -> str:
    return name.replace("attention.attention", "attention.module.attention._orig_mod")


def under(**names: str) -> Writer:
    """Return a function that renames the parts."""
    return lambda content: {names.get(part, part): value for part, value in content.items()}


def change(part: str, function: Callable[[Any], Any]) -> Writer:
    return lambda content: {**content, part: function(content[part])}


def for_weights(rename: Callable[[str], str]) -> Writer:
    return lambda content: {**content, **{part: renamed(content[part], rename) for part in ("model", "model_ema")}}


def beside(**entries: Any) -> Writer:
    return lambda content: {**content, **entries}


def by_name(optimizer: Content) -> Content:
    """Return AdamW's state as `FSDP.optim_state_dict` does: by the parameter's name."""
    decayed, undecayed = parameter_groups(DiT(**CONFIG))
    order = decayed + undecayed
    groups = [{"params": order[:4], "lr": 1e-4}, {"params": order[4:], "lr": 1e-4}]
    return {"state": dict(zip(order, optimizer["state"].values(), strict=True)), "param_groups": groups}


def lightning(content: Content) -> Content:
    weights = prefixed(content["model"], "model.") | prefixed(content["model_ema"], "ema_model.module.")
    return {
        "epoch": 3,
        "global_step": content["step"] + 1,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict(weights),
        "optimizer_states": [content["optimizer"]],
        "lr_schedulers": [{"last_epoch": 3, "lr_lambdas": [half]}],
        "callbacks": {"ModelCheckpoint": {"best_model_path": "a.ckpt"}},
        "hyper_parameters": {"lr": 1e-4},
    }


def lightning_average(content: Content) -> Content:
    """Return what Lightning's WeightAveraging writes: the average in place of the weights."""
    return {
        "state_dict": prefixed(content["model_ema"], "model."),
        "current_model_state": prefixed(content["model"], "model."),
        "averaging_state": {"n_averaged": torch.tensor(3)},
        "optimizer_states": [content["optimizer"]],
        "global_step": content["step"] + 1,
    }


def diffusers_ema(ema: Content) -> Content:
    return {
        "decay": 0.9999,
        "optimization_step": 8,
        "use_ema_warmup": False,
        "shadow_params": list(parameters(ema).values()),
    }


def ema_pytorch(content: Content) -> Content:
    counters = {"initted": torch.tensor(True), "step": torch.tensor(1000)}
    return counters | prefixed(content["model"], "online_model.") | prefixed(content["model_ema"], "ema_model.")


def latent_diffusion(content: Content) -> Content:
    """Return the weights and the EMA of LitEma, whose names have no dots, in one state dictionary."""
    ema = renamed(parameters(content["model_ema"]), lambda name: f"model_ema.{name.replace('.', '')}")
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(1000)}
    state = prefixed(content["model"], "model.") | counters | ema
    return {"state_dict": state, "optimizer_states": [content["optimizer"]], "global_step": content["step"] + 1}


def flat_optimizer(optimizer: Content) -> Content:
    return {
        f"state.{name}.{key}": item
        for name, state in by_name(optimizer)["state"].items()
        for key, item in state.items()
    }


WRITERS: dict[str, Writer] = {
    "DiT": under(model_ema="ema", optimizer="opt"),
    "DiT without a step": lambda content: {
        "model": content["model"],
        "ema": content["model_ema"],
        "opt": content["optimizer"],
        "args": argparse.Namespace(lr=1e-4),
    },
    "tutorial": under(model="model_state_dict", model_ema="ema_state_dict", optimizer="optimizer_state_dict"),
    "PixArt": under(model="state_dict", model_ema="state_dict_ema"),
    "global_step": under(step="global_step"),
    "iteration": under(step="iteration", optimizer="optim"),
    "completed steps": lambda content: {**content, "step": content["step"] + 1},
    "train_steps as a tensor": lambda content: {**under(step="train_steps")(content), "train_steps": torch.tensor(7)},
    "timm": lambda content: {
        "epoch": 3,
        "arch": "dit",
        **under(model="state_dict", model_ema="state_dict_ema")(content),
        "args": argparse.Namespace(lr=1e-4),
        "amp_scaler": {"scale": 65536.0},
        "metric": 0.5,
    },
    "BasicSR": under(model="params", model_ema="params_ema"),
    "DeepSpeed": under(model="module", step="global_steps"),
    "network": under(model="network", model_ema="ema_network"),
    "camel case": under(model="modelState", model_ema="emaState", optimizer="optimizerState", step="globalStep"),
    "nested": lambda content: {"checkpoint": under(model_ema="ema")(content), "epoch": 3},
    "application state": lambda content: {"app": content},
    "EMA nested": change("model_ema", lambda ema: {"decay": 0.999, "module": prefixed(ema, "module.")}),
    "model nested": change("model", lambda model: {"state_dict": model, "config": {"width": 32}}),
    "optimizers in a list": change("optimizer", lambda optimizer: [optimizer]),
    "optimizer nested": change("optimizer", lambda optimizer: {"adamw": optimizer, "lr": 1e-4}),
    "Lightning": lightning,
    "Lightning's WeightAveraging": lightning_average,
    "latent diffusion": latent_diffusion,
    "diffusers' EMAModel": lambda content: {
        **under(model_ema="ema")(content),
        "ema": diffusers_ema(content["model_ema"]),
    },
    "shadow_params": lambda content: {
        **{part: content[part] for part in ("model", "optimizer", "step")},
        "shadow_params": list(parameters(content["model_ema"]).values()),
    },
    "ema_pytorch": lambda content: {**under(model_ema="ema")(content), "ema": ema_pytorch(content)},
    "AveragedModel": change(
        "model_ema", lambda ema: {"n_averaged": torch.tensor(1000), **prefixed(ema, "module._orig_mod.")}
    ),
    "compiled blocks": for_weights(in_blocks("_orig_mod")),
    "checkpointed blocks": for_weights(in_blocks("_checkpoint_wrapped_module")),
    "FSDP": for_weights(
        lambda name: "_fsdp_wrapped_module." + in_blocks("_fsdp_wrapped_module._checkpoint_wrapped_module")(name)
    ),
    "wrapped attention": for_weights(in_attention),
    "attribute of a module": for_weights(lambda name: f"module.model.{name}"),
    "FSDP's optimizer by name": change("optimizer", by_name),
    "optimizer by wrapped names": change(
        "optimizer",
        lambda optimizer: {"state": prefixed(by_name(optimizer)["state"], "_fsdp_wrapped_module._orig_mod.")},
    ),
    "flat optimizer": change("optimizer", flat_optimizer),
    "Namespace": beside(args=argparse.Namespace(lr=1e-4, out=pathlib.Path("/out"))),
    "path": beside(data_dir=pathlib.Path("/data/imagenet"), other=pathlib.PurePosixPath("a")),
    "NumPy scalars": beside(best_loss=np.float64(0.5), flag=np.bool_(True), name=np.str_("a")),
    "NumPy's step": change("step", np.int64),
    "NumPy array as step": change("step", np.array),
    "NumPy weights": change("model", lambda model: {name: tensor.numpy() for name, tensor in model.items()}),
    "random states": beside(
        rng={"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        generator=np.random.default_rng(0),
        cuda_rng=[torch.get_rng_state()] * 16,
    ),
    "dataclass": beside(config=ModelArguments(), cls=ModelArguments),
    "unknown dictionaries": beside(config=EasyDict(width=32, nested=EasyDict()), counts=defaultdict(list, a=[1])),
    "weights in a dictionary of another class": change("model", EasyDict),
    "simple namespace": beside(config=types.SimpleNamespace(width=32), function=half),
    "nested class": beside(config=ModelArguments.Inner(), method=ModelArguments().double),
    "functions": beside(function=abs, kind=int, numbers=range(3), partial=functools.partial(int, "3")),
    "a small module": beside(probe=torch.nn.Linear(2, 2)),
    "losses": beside(losses=[torch.tensor(1.0)] * 100, betas={"beta": torch.linspace(0, 1, 100)}),
    "state of a data loader": beside(loader={"state": {"epoch": {"index": 3}}}),
    "empty EMA": beside(ema=None, ema_decay=0.999, swa=False),
}


def check_same(checkpoint: Checkpoint, stage1: Checkpoint) -> None:
    assert (checkpoint.step, checkpoint.config) == (8, CONFIG)
    for field in ("model", "ema", "optimizer"):
        actual, expected = getattr(checkpoint, field), getattr(stage1, field)
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(actual[name], tensor), f"{field}: {name}"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "before 1.6"])
def test_state_is_that_of_the_plain_file(stage1, content, tmp_path, name, is_archive):
    torch.save(WRITERS[name](content), tmp_path / "c.pt", _use_new_zipfile_serialization=is_archive)
    check_same(formats.read(tmp_path / "c.pt", base_latent_size=8), stage1)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_protocols_of_pickle(stage1, content, tmp_path, protocol):
    torch.save({**content, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pt", pickle_protocol=protocol)
    check_same(formats.read(tmp_path / "c.pt", base_latent_size=8), stage1)


@pytest.mark.parametrize("kind", ["AveragedModel", "ema_pytorch", "dotted"])
def test_state_dictionary_alone(stage1, content, tmp_path, kind):
    model = DiT(**CONFIG)
    model.load_state_dict(stage1.model)
    states = {
        "AveragedModel": AveragedModel(torch.nn.Sequential(OrderedDict(model=model))).state_dict(),
        "ema_pytorch": ema_pytorch(content),
        "dotted": prefixed(stage1.model, "model._orig_mod."),
    }
    torch.save(states[kind], tmp_path / "c.pt")
    checkpoint = formats.read(tmp_path / "c.pt", base_latent_size=8)
    ema = stage1.ema if kind == "ema_pytorch" else stage1.model
    for actual, expected in ((checkpoint.model, stage1.model), (checkpoint.ema, ema)):
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


DISTRIBUTED: dict[str, Writer] = {
    "plain": lambda content: content,
    "other names": under(model_ema="ema", optimizer="optim", step="global_step"),
    "application": lambda content: {"app": under(model_ema="ema")(content)},
    "NumPy's step": change("step", np.int64),
    "random state": beside(rng_state=torch.get_rng_state(), numpy=np.random.get_state()),
    "optimizer by index": lambda content: content,
    "shadow_params": change("model_ema", lambda ema: diffusers_ema(ema)),
    "objects": beside(args=argparse.Namespace(lr=1), path=pathlib.Path("/data"), scheduler={"last_epoch": 3}),
    "tensors of all kinds": beside(
        mask=torch.tensor([True, False]),
        counts=torch.zeros(3, dtype=torch.int16),
        phase=torch.zeros(2, dtype=torch.cfloat),
    ),
    "EMA with counters": change("model_ema", lambda ema: {"n_averaged": torch.tensor(9), **prefixed(ema, "module.")}),
}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_distributed_checkpoint(stage1, content, tmp_path, name):
    if name != "optimizer by index":
        content["optimizer"] = {"state": by_name(content["optimizer"])["state"]}
    content = DISTRIBUTED[name](content)
    dcp.save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    check_same(formats.read(tmp_path / "dcp", base_latent_size=8), stage1)


def test_truncated_distributed_checkpoint(content, tmp_path):
    dcp.save({"model": content["model"]}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    part = tmp_path / "dcp/__0_0.distcp"
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    check_refused(tmp_path / "dcp", r"__0_0\.distcp is truncated")


OTHER_MODULES = {f"vae.layer{index}.weight": torch.zeros(3) for index in range(20)}
REFUSED: dict[str, tuple[Writer, str]] = {
    "unknown EMA": (under(model_ema="teacher"), "'teacher' looks like training state"),
    "unknown optimizer": (under(optimizer="muon"), "'muon' looks like training state"),
    "EMA as one tensor": (beside(flat=torch.zeros(10_000)), "'flat' looks like training state"),
    "EMA in an object": (
        lambda content: {**content, "helper": types.SimpleNamespace(shadow=dict(content["model_ema"]))},
        "'helper' looks like training state .types.SimpleNamespace",
    ),
    "two EMA": (lambda content: {**content, "ema": content["model_ema"]}, "'model_ema' and 'ema' may both be"),
    "two optimizers": (change("optimizer", lambda optimizer: [optimizer] * 2), "'optimizer' is not a state dict"),
    "another optimizer": (
        change("optimizer", lambda optimizer: {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}),
        "momentum_buffer",
    ),
    "two keys that become one": (
        change("model", lambda model: {**model, "module.patchify.bias": model["patchify.bias"]}),
        "'patchify.bias' and 'module.patchify.bias' are both",
    ),
    "an EMA without names that lacks one": (
        change("model_ema", lambda ema: {"shadow_params": list(parameters(ema).values())[1:]}),
        "tensors, the model has",
    ),
    "weights of other modules": (
        lambda content: under(model="state_dict")({**content, "model": content["model"] | OTHER_MODULES}),
        "'state_dict' has 20 tensors that the model does not have, for example 'vae.layer0.weight'",
    ),
    "whole module": (lambda content: {"model": DiT(**CONFIG)}, "'model' is a whole module, pixart.model.dit.DiT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_its_cause(content, tmp_path, name):
    write, cause = REFUSED[name]
    torch.save(write(content), tmp_path / "c.pt")
    check_refused(tmp_path / "c.pt", cause)


@pytest.mark.parametrize(
    "name",
    [
        "unknown EMA",
        "unknown optimizer",
        "EMA in an object",
        "two EMA",
        "another optimizer",
        "weights of other modules",
    ],
)
def test_ignored_on_request(content, tmp_path, name):
    torch.save(REFUSED[name][0](content), tmp_path / "c.pt")
    checkpoint = formats.read(tmp_path / "c.pt", base_latent_size=8, ignore_unknown=True)
    assert torch.equal(checkpoint.model["patchify.weight"], content["model"]["patchify.weight"])
    assert checkpoint.provenance["unused_entries"]["count"] == (20 if name == "weights of other modules" else 1)


def check_refused(path: Path, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        formats.read(path, base_latent_size=8)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


class MaliciousObject:
    """Object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("function", [os.mkdir, exec, eval, open, getattr, pathlib.Path.mkdir, half])
def test_no_code_of_a_file_is_run(content, tmp_path, monkeypatch, function, is_archive):
    created = tmp_path / "created"
    arguments = {
        exec: (f"import os; os.mkdir({str(created)!r})",),
        eval: (f"__import__('os').mkdir({str(created)!r})",),
    }
    values = arguments.get(function, (str(created), "w") if function is open else (str(created),))
    content["args"] = MaliciousObject(function, *values)
    torch.save(content, tmp_path / "c.pt", _use_new_zipfile_serialization=is_archive)
    if function is half:  # its name says nothing about what it does: it is neither imported nor called
        monkeypatch.setattr(f"{__name__}.half", lambda _: created.mkdir())
        assert formats.read(tmp_path / "c.pt", base_latent_size=8).step == 8
    else:
        check_refused(tmp_path / "c.pt", "it refers to .*, and only tensors")
    assert not created.exists()


def test_other_files_are_named(tmp_path, stage1):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "scripted.pt")
    check_refused(tmp_path / "scripted.pt", "TorchScript")
    torch.save(DiT(**CONFIG), tmp_path / "module.pt")
    check_refused(tmp_path / "module.pt", "an object of pixart.model.dit.DiT")
    torch.save({"weights": stage1.model}, tmp_path / "weights.pt")
    check_refused(tmp_path / "weights.pt", "no entry 'model' with named tensors; its entries are 'weights'")


def test_unused_entries_are_listed(content, tmp_path, capsys):
    content |= {f"entry{index}": index for index in range(11)} | {"a\x1b[31m": 1}
    torch.save(content, tmp_path / "c.pt")
    words = [str(tmp_path / "c.pt"), "--base-latent-size", "8", "--text-dim", "16", "--dry-run"]
    assert main(words) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("unused"))
    assert line.startswith("unused      12 entries of the source: entry0, entry1, ")
    assert line.endswith("entry9 and 2 more")
    assert "\x1b" not in line
    content["teacher"] = content["model_ema"]
    torch.save(content, tmp_path / "c.pt")
    assert main(words) == 2
    assert "--ignore-unknown" in capsys.readouterr().err
    assert main([*words, "--ignore-unknown"]) == 0


def test_unused_entries_are_in_the_report(content, tmp_path, capsys):
    torch.save({**content, "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "c.pt")
    words = ["--base-latent-size", "8", "--text-dim", "16", "--num-batches", "1", "--batch-size", "2", "--stage", "1"]
    assert main([str(tmp_path / "c.pt"), *words]) in (0, 3)
    text = "2 entries of the source: epoch, args"
    assert f"unused      {text}" in capsys.readouterr().out
    report = json.loads((tmp_path / "c.fp8/report.json").read_text())
    assert report["unused_entries"] == {"count": 2, "names": ["epoch", "args"]}
    assert text in (tmp_path / "c.fp8/report.html").read_text()


CASES = ("names_*", "wrapped_*", "average_swa.pt", "beside_*", "step_numpy.pt", "format_before_1_6.pt", "dcp_*")


@pytest.mark.slow
def test_cases(shared_data, tmp_path):
    """Every checkpoint that the collection of cases writes has the state of the plain file, or is refused."""
    script = shared_data.parent / "cases/make_checkpoints.py"
    if not script.exists():
        pytest.skip(f"{script} is absent")
    process = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    expected = formats.read(shared_data / "legacy/dev_stage1.pt")
    paths = sorted(path for pattern in CASES for path in tmp_path.glob(pattern))
    assert len(paths) == 15
    for path in paths:
        if path.name == "dcp_truncated":
            check_refused(path, "truncated")
            continue
        checkpoint = formats.read(path)
        assert (checkpoint.step, checkpoint.config) == (expected.step, expected.config), path
        for field in ("model", "ema") if path.is_dir() else ("model", "ema", "optimizer"):
            actual, state = getattr(checkpoint, field), getattr(expected, field)
            assert actual.keys() == state.keys()
            assert all(torch.equal(actual[name], state[name]) for name in state), f"{path}: {field}"
