"""More than a hundred damaged inputs: each is refused in one line, with no code executed and no file changed."""

import hashlib
import io
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conversion.to_fp8 import main
from pixart.checkpoint import directory as checkpoints
from tests.support.checkpoints import legacy_content

QUICK = ["--num-batches", "1", "--batch-size", "2", "--text-dim", "16", "--stage", "1"]
FILE_OPTIONS = ["--base-latent-size", "8"]  # a directory records its latent size
WEIGHT = "_orig_mod.dit_blocks.1.mlp.linear1.weight"
TRUNCATIONS = 24
pytestmark = pytest.mark.slow
NAN, INF = float("nan"), float("inf")


class MaliciousObject:
    """Object that creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


Damage = Callable[[dict[str, Any]], object]


def damages() -> Iterator[tuple[str, Damage]]:
    """Yield the name of each damage and a function that applies it to the content of a legacy file."""
    for shape in ((), (0,), (128,), (127, 32), (32, 128), (128, 32, 1)):
        yield f"shape {shape}", with_weight(lambda old, shape=shape: torch.zeros(shape))
    for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64):
        yield f"dtype {dtype}", with_weight(lambda old, dtype=dtype: old.to(dtype))
    for value in (3, None, "text", [1.0], {"a": 1}):
        yield f"weight is {value!r}", with_weight(lambda old, value=value: value)
    for key in ("patchify.weight", "cond_proj.weight", "adaLN1.weight", "adaLN1.bias", "linear_out.bias"):
        yield f"no {key}", lambda content, key=key: content["model"].pop(f"_orig_mod.{key}")
    for key in ("adaLN2.bias", "mlp.linear1.weight", "attention.attention.q_norm.weight"):
        for block in (0, 2):
            name = f"_orig_mod.dit_blocks.{block}.{key}"
            yield f"no {key} in block {block}", lambda content, name=name: content["model"].pop(name)
    for key in ("lora.weight", "dit_blocks.3.adaLN1.bias", "dit_blocks.x.weight", "", "module."):
        yield f"extra {key!r}", lambda content, key=key: content["model"].update({key: torch.zeros(4)})
    for group in ("model", "model_ema"):
        for value in (NAN, INF, -INF):
            yield f"{value} in {group}", lambda content, g=group, v=value: last(content[g]).view(-1)[-1:].fill_(v)
    for key, values in {
        "model": (None, 3, [], {}, torch.zeros(3)),
        "model_ema": (3, [1], {"a": torch.zeros(2)}),
        "step": ("7", -9, 1.5, None),
        "optimizer": ([1], {"state": 3}, {"state": {0: 3}}),
    }.items():
        for value in values:
            yield f"{key} is {value!r}", lambda content, key=key, value=value: content.update({key: value})
    yield "moment has nan", with_moment("exp_avg", lambda old: old * NAN)
    yield "moment has inf", with_moment("exp_avg_sq", lambda old: old + INF)
    yield "moment is negative", with_moment("exp_avg_sq", lambda old: -old)
    yield "moment is a number", with_moment("exp_avg", lambda old: 3.0)
    yield "moment is of integers", with_moment("exp_avg", lambda old: old.int())
    yield "moment is missing", lambda content: content["optimizer"]["state"][5].pop("exp_avg")
    yield "one state too many", lambda content: content["optimizer"]["state"].update({999: states(content)[0]})
    yield "moments of other parameters", lambda content: states(content).update({0: states(content)[1]})
    yield "moments swapped", swap_moments


def with_weight(change: Callable[[torch.Tensor], object]) -> Damage:
    return lambda content: content["model"].update({WEIGHT: change(content["model"][WEIGHT])})


def with_moment(name: str, change: Callable[[torch.Tensor], object]) -> Damage:
    return lambda content: states(content)[5].update({name: change(states(content)[5][name])})


def states(content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    return content["optimizer"]["state"]


def last(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state[next(reversed(state))]


def swap_moments(content: dict[str, Any]) -> None:
    for state in states(content).values():
        state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"]


CONTENTS = dict(damages())


@pytest.mark.parametrize("name", CONTENTS)
def test_damaged_content_is_refused(legacy_file, capsys, name):
    content = torch.load(legacy_file, weights_only=True)
    CONTENTS[name](content)
    torch.save(content, legacy_file)
    check_refused(legacy_file, capsys)


@pytest.mark.parametrize("number", range(TRUNCATIONS))
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_truncated_file_is_refused(stage1, legacy_file, capsys, kind, number):
    path = legacy_file
    if kind == "safetensors":
        path = legacy_file.with_name("weights.safetensors")
        save_file(stage1.model, path)
    content = path.read_bytes()
    path.write_bytes(content[: random.Random(number).randrange(len(content))])
    check_refused(path, capsys)


@pytest.mark.parametrize("file", ["training.json", "transformer/config.json", "optimizer.safetensors", "ema"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_damaged_directory_is_refused(stage1, tmp_path, capsys, file, damage):
    path = checkpoints.save(stage1, tmp_path / "checkpoint") / file
    if path.is_dir():
        path = path / checkpoints.WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    if damage == "missing":
        path.unlink()
    check_refused(tmp_path / "checkpoint", capsys)


@pytest.mark.parametrize("kind", ["pickle", "archive", "old archive", "distributed"])
def test_pickled_code_is_not_executed(stage1, tmp_path, capsys, kind):
    path, created = tmp_path / "c.pt", tmp_path / "created"
    match kind:
        case "pickle":
            path.write_bytes(pickle.dumps(MaliciousObject(created)))
        case "archive":
            torch.save({**legacy_content(stage1), "malicious": MaliciousObject(created)}, path)
        case "old archive":
            torch.save({"model": MaliciousObject(created)}, path, _use_new_zipfile_serialization=False)
        case "distributed":
            path = tmp_path / "c"
            path.mkdir()
            (path / ".metadata").write_bytes(pickle.dumps(MaliciousObject(created)))
    check_refused(path, capsys)
    assert not created.exists()


@pytest.mark.parametrize("kind", ["compressed", "overlapping"])
def test_decompression_bomb_is_refused(legacy_file, capsys, kind):
    """The archive has a few kilobytes and claims gigabytes."""
    with zipfile.ZipFile(legacy_file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in contents if "/data/" in name)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, content in contents.items():
            archive.writestr(name, bytes(64 << 20) if name == data and kind == "compressed" else content)
        if kind == "overlapping":
            for entry in list(archive.filelist):
                entry.file_size = entry.compress_size = 1 << 30
    legacy_file.write_bytes(bomb.getvalue())
    check_refused(legacy_file, capsys)


def test_directory_of_random_bytes_is_refused(tmp_path, capsys):
    directory = tmp_path / "random"
    for name in (".metadata", "config.json", checkpoints.WEIGHTS):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        (directory / name).write_bytes(random.Random(0).randbytes(5000))
        (directory / "notes.txt").write_text("nothing here")
        check_refused(directory, capsys)


def check_refused(path: Path, capsys: pytest.CaptureFixture) -> None:
    before = fingerprint(path.parent)
    assert main([str(path), *QUICK, *([] if path.is_dir() else FILE_OPTIONS)]) == 2
    captured = capsys.readouterr()
    assert "--base-latent-size" not in captured.err
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert path.name in last
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert fingerprint(path.parent) == before


def fingerprint(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a folder, and an empty string for every directory."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def test_number_of_damages():
    assert len(CONTENTS) + 2 * TRUNCATIONS + 12 + 4 + 2 + 3 >= 100
