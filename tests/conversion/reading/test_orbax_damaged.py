"""Damaged checkpoints of the original JAX training: each is refused in one line, with nothing written."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion.reading import orbax
from conversion.to_fp8 import main
from tests.conversion.reading.test_damaged import fingerprint
from tests.support import equinox_model
from tests.support.equinox_model import COUNT, MU, NU, Arrays

Q_PROJ = "dit_blocks.0.attention.attention.q_proj.weight"
Q_NORM = "dit_blocks.0.attention.attention.q_norm"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_jax")]


def refusal(path: Path, capsys: pytest.CaptureFixture) -> str:
    """Convert `path`; return the error, after checking that it is one line and that nothing was written."""
    before = fingerprint(path.parents[1])
    capsys.readouterr()
    words = ["--num-batches", "1", "--batch-size", "2", "--text-dim", "16", "--stage", "1", "--base-latent-size", "8"]
    assert main([str(path), *words, "--output", str(path.parents[1] / "written")]) == 2
    captured = capsys.readouterr()
    line = captured.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert captured.err.count("error: ") == 1
    assert "Traceback" not in captured.err
    assert fingerprint(path.parents[1]) == before
    return line


def rewrite(step: Path, change: Callable[[Arrays], Any], item: str = "state", **layout: bool) -> None:
    """Write an item of a step again, with its arrays changed."""
    original = orbax.read_items(step)[item == "model_ema"]
    assert original is not None
    arrays = {name: np.array(array.read().result()) for name, array in orbax.open_arrays(original).items()}
    change(arrays)
    (step / item).rename(step.parents[1] / "original")
    equinox_model.write_item(step / item, arrays, **layout)


def change_metadata(step: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = step / "state/_METADATA"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def truncate(step: Path, fraction: float) -> None:
    """Truncate every data file; in some, the end has earlier versions of the database, which nothing refers to."""
    for file in (step / "state/d").iterdir():
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * fraction)])


def rename_array(content: dict[str, Any], keys: list[Any]) -> None:
    entry = next(entry for key, entry in content["tree_metadata"].items() if "q_proj" in key)
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]


def link(path: Path, target: Path | str) -> None:
    if path.is_dir():
        path.rename(path.parents[2] / "moved")
        target = path.parents[2] / "moved"
    else:
        path.unlink()
    path.symlink_to(target)


def remove_chunk(step: Path) -> None:
    """Remove the only chunk of an array, which the format reads as zeros."""
    rewrite(step, lambda arrays: None, use_ocdbt=False)
    (step / f"state/0.{Q_PROJ}/0.0").unlink()


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "no metadata": ("_METADATA: is missing", lambda step: (step / "state/_METADATA").unlink()),
    "metadata of an item is no JSON": ("is not JSON", lambda step: (step / "state/_METADATA").write_text("{")),
    "metadata is nested deeply": ("is not JSON", lambda step: (step / "state/_METADATA").write_text("[" * 100_000)),
    "metadata is a list": ("Expected 'object'", lambda step: (step / "state/_METADATA").write_text("[]")),
    "metadata of the step is no JSON": ("is not JSON", lambda step: (step / "_CHECKPOINT_METADATA").write_text("\0")),
    "no tree": ("tree_metadata", lambda step: change_metadata(step, lambda content: content.pop("tree_metadata"))),
    "empty tree": ("no weights", lambda step: change_metadata(step, lambda content: content["tree_metadata"].clear())),
    "tree of numbers": ("names an array", lambda step: change_metadata(step, lambda c: c["tree_metadata"].update(a=3))),
    **{
        f"array named {'.'.join(map(str, keys))[:20]!r}": (
            "names an array",
            lambda step, keys=keys: change_metadata(step, lambda content: rename_array(content, keys)),
        )
        for keys in (
            ["..", "..", "passwd"],
            ["0", "/etc/passwd"],
            ["0", ""],
            ["0", "a\0b"],
            [],
            [{"a": 1}],
            ["0", "a/../b"],
        )
    },
    "array named twice": (
        "twice",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["0", "adaLN1", "bias"])),
    ),
    "array of no model": (
        "allowed are",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["2", "x"])),
    ),
    "array that is not stored": (
        "cannot be read",
        lambda step: change_metadata(step, lambda content: rename_array(content, ["0", "x"])),
    ),
    "no EMA": ("model_ema: is missing", lambda step: (step / "model_ema").rename(step.parents[1] / "moved")),
    "no state": ("state: is missing", lambda step: (step / "state").rename(step.parents[1] / "moved")),
    "state is a link": ("symbolic link", lambda step: link(step / "state", "")),
    "metadata is a link": ("symbolic link", lambda step: link(step / "state/_METADATA", "/dev/zero")),
    "data is a link": (
        "symbolic link",
        lambda step: link(next((step / "state/d").iterdir()), "/etc/hostname"),
    ),
    "data is a pipe": ("neither a file", lambda step: os.mkfifo(step / "state/d/pipe")),
    "no manifest": ("truncated", lambda step: (step / "state/manifest.ocdbt").unlink()),
    "empty manifest": ("truncated", lambda step: (step / "state/manifest.ocdbt").write_bytes(b"")),
    "manifest of zeros": ("truncated", lambda step: (step / "state/manifest.ocdbt").write_bytes(bytes(200))),
    **{
        f"data truncated to {fraction:.0%}": ("cannot be read", lambda step, f=fraction: truncate(step, f))
        for fraction in (0, 0.3, 0.8, 0.999)
    },
    "missing chunk": ("cannot be read", remove_chunk),
    "no weights": (
        "no weights",
        lambda step: rewrite(step, lambda a: [a.pop(name) for name in list(a) if name.startswith("0.")]),
    ),
    "no count": ("no array 1.1.0.count", lambda step: rewrite(step, lambda arrays: arrays.pop(COUNT))),
    "negative count": ("steps", lambda step: rewrite(step, lambda arrays: arrays.update({COUNT: np.int32(-1)}))),
    "count is a vector": ("steps", lambda step: rewrite(step, lambda a: a.update({COUNT: zeros(2, dtype="int32")}))),
    "missing weight": ("lack 1", lambda step: rewrite(step, lambda arrays: arrays.pop(f"0.{Q_NORM}.bias"))),
    "missing moment": ("lack 1", lambda step: rewrite(step, lambda arrays: arrays.pop(f"{MU}.{Q_PROJ}"))),
    "unknown weight": ("adapter", lambda step: rewrite(step, lambda a: a.update({"0.adapter.weight": zeros(2)}))),
    "other optimizer": ("1.0.trace", lambda step: rewrite(step, lambda a: a.update({"1.0.trace.x": zeros(2)}))),
    "other shape": ("shape", lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 31)}))),
    "other shape of a moment": ("shape", lambda step: rewrite(step, lambda a: a.update({f"{NU}.{Q_PROJ}": zeros(32)}))),
    "other shape of the EMA": (
        "shape",
        lambda step: rewrite(step, lambda arrays: arrays.update({Q_PROJ: zeros(1, 32)}), "model_ema"),
    ),
    "dimension of 34": ("stage-1 model", lambda step: rewrite(step, lambda a: a.update(narrow(a)))),
    "integers": (
        "int32",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="int32")})),
    ),
    "float16": (
        "float16",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="float16")})),
    ),
    "complex": (
        "complex64",
        lambda step: rewrite(step, lambda a: a.update({f"0.{Q_PROJ}": zeros(32, 32, dtype="complex64")})),
    ),
    "not a number": ("NaN", lambda step: rewrite(step, lambda a: a[f"0.{Q_PROJ}"].fill(np.nan))),
    "negative second moment": ("negative", lambda step: rewrite(step, lambda a: a[f"{NU}.{Q_PROJ}"].fill(-1))),
    "huge shape": ("claim", lambda step: claim(step, {"shape": [1 << 30, 1 << 30], "chunks": [32, 32]})),
    "huge chunk": ("chunks", lambda step: claim(step, {"chunks": [1 << 30, 1 << 30]})),
    "stage 2": (
        "never validated",
        lambda step: rewrite(step, lambda a: a.update({"0.adaLN1_single.weight": zeros(32, 16)})),
    ),
}


def narrow(arrays: Arrays) -> Arrays:
    """Return the first convolution of a model whose dimension is no multiple of 4."""
    weight = arrays["0.patchify.weight"]
    return {"0.patchify.weight": np.concatenate([weight, weight[:2]])}


def claim(step: Path, metadata: dict[str, Any]) -> None:
    """Change the metadata of an array, in a checkpoint without OCDBT."""
    rewrite(step, lambda arrays: None, use_ocdbt=False)
    path = step / f"state/0.{Q_PROJ}/.zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **metadata}))


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_refused(step, capsys, name):
    message, damage = DAMAGES[name]
    damage(step)
    line = refusal(step, capsys)
    assert message in line
    assert str(step) in line


@pytest.mark.slow
def test_stage_2_under_another_name_is_refused(tmp_path, capsys):
    """The JAX re-parameterization saved its result as the item `model` of step 0."""
    arrays = {"patchify.weight": zeros(32, 16, 2, 2), "dit_blocks.0.cross_attention.q_proj.weight": zeros(32, 32)}
    equinox_model.write_item(tmp_path / "new/0/model", arrays)
    (tmp_path / "new/0/_CHECKPOINT_METADATA").write_text("{}")
    for path in (tmp_path / "new", tmp_path / "new/0", tmp_path / "new/0/model"):
        assert "never validated" in refusal(path / ".", capsys)


def test_missing_tensorstore_is_named_with_the_command_that_installs_it(step, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    assert 'pip install "pixart-suite[jax-checkpoints]"' in refusal(step, capsys)
