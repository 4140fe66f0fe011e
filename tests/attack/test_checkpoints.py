"""Damaged and hostile checkpoints: each is read with finite tensors, or refused in one line, and no code of it is run.

`python -m tests.attack.test_checkpoints KIND` tries the inputs of one kind; see `tests.attack.mutations`.
"""

import argparse
import io
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

from conversion.reading import formats
from pixart.model.dit import DiT
from tests.attack.mutations import attack_kind, number, outcomes_of

CONFIG = {"in_dim": 4, "dim": 16, "cond_dim": 8, "num_heads": 1, "mlp_ratio": 1, "num_blocks": 1, "patch_size": 2}
CONFIG |= {"base_image_size": 8, "num_classes": 3}
CANARY = Path(gettempdir(), "pixart-attack-canary")  # exists once code of a checkpoint was run


class Payload:
    """Object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def content() -> dict[str, Any]:
    torch.manual_seed(0)
    model = DiT(**CONFIG)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {
        index: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(item), "exp_avg_sq": torch.zeros_like(item)}
        for index, item in enumerate(model.parameters())
    }
    optimizer = {"state": moments, "param_groups": [{"params": list(range(len(moments)))}]}
    return {"model": state, "ema": state, "optimizer": optimizer, "step": np.int64(2), "args": argparse.Namespace(lr=1)}


def saved(value: Any, **options: Any) -> bytes:
    torch.save(value, file := io.BytesIO(), **options)
    return file.getvalue()


def archives() -> dict[str, bytes]:
    return {"archive": saved(content()), "protocol 4": saved({"model": content()["model"]}, pickle_protocol=4)}


def pickles() -> dict[str, bytes]:
    """Return files of the format before torch 1.6, whose pickles begin the file."""
    small = {name: tensor for name, tensor in content().items() if name != "optimizer"}
    return {"before 1.6": saved(small, _use_new_zipfile_serialization=False)}


def tensors() -> dict[str, bytes]:
    state = content()["model"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, "model-1.safetensors")}
    return {"safetensors": save(state), "index": json.dumps(index).encode()}


def distributed() -> dict[str, bytes]:
    """Return the metadata of a directory, whose other file stays intact."""
    with TemporaryDirectory() as folder:
        dcp.save(state(), checkpoint_id=folder, no_dist=True)
        return {"metadata": (Path(folder) / ".metadata").read_bytes()}


def state() -> dict[str, Any]:
    return {"model": content()["model"], "step": 2, "rng": torch.get_rng_state()}


def put_file(folder: Path, data: bytes) -> Path:
    (folder / "c.pt").write_bytes(data)
    return folder / "c.pt"


def put_tensors(folder: Path, data: bytes) -> Path:
    is_index = b"weight_map" in data or data[:1] in (b"{", b"[")
    if is_index:
        (folder / "model-1.safetensors").write_bytes(save(content()["model"]))
    name = "model.safetensors.index.json" if is_index else "c.safetensors"
    (folder / name).write_bytes(data)
    return folder / name


def put_distributed(folder: Path, data: bytes) -> Path:
    dcp.save(state(), checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(data)
    return folder


KINDS: dict[str, tuple[int, Callable[[], dict[str, bytes]], Callable[[Path, bytes], Path]]] = {
    "archives": (200, archives, put_file),
    "pickles": (150, pickles, put_file),
    "tensors": (100, tensors, put_tensors),
    "distributed": (50, distributed, put_distributed),
}


def attempt(put: Callable[[Path, bytes], Path]) -> Callable[[bytes], str]:
    """Return a function that reads a damaged checkpoint with all of its tensors."""

    def read(data: bytes) -> str:
        with TemporaryDirectory() as folder:
            checkpoint = formats.read(put(Path(folder), data), base_latent_size=8)
            for part in (checkpoint.model, checkpoint.ema, checkpoint.optimizer):
                for name in part:
                    assert torch.isfinite(part[name]).all()
            assert not CANARY.exists()
            return "read"

    return read


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(kind):
    outcomes = outcomes_of("tests.attack.test_checkpoints", kind)
    assert len(outcomes) == number(KINDS[kind][0])
    refused = [outcome for outcome in outcomes if outcome["outcome"].startswith("refused")]
    print(f"{kind}: {len(outcomes) - len(refused)} read, {len(refused)} refused")
    assert len(refused) > len(outcomes) // 20


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "os.system": (os.system, f"touch {CANARY}"),
    "exec": (exec, f"open({str(CANARY)!r}, 'w')"),
    "eval": (eval, f"open({str(CANARY)!r}, 'w')"),
    "open": (open, str(CANARY), "w"),
    "pathlib": (Path.touch, CANARY),
    "numpy": (np.save, str(CANARY), 1),
    "torch.load": (torch.load, str(CANARY)),
    "pickle.loads": (pickle.loads, b"cos\nsystem\n(S'touch'\ntR."),
    "runpy": (__import__("runpy").run_path, str(CANARY)),
    "torch.hub": (torch.hub.load, "a/b", "c"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "before 1.6"])
def test_functions_are_never_called(tmp_path, name, is_archive):
    CANARY.unlink(missing_ok=True)
    function, *arguments = FUNCTIONS[name]
    data = {**content(), "args": Payload(function, *arguments)}
    (tmp_path / "c.pt").write_bytes(saved(data, _use_new_zipfile_serialization=is_archive))
    with suppress(ValueError):  # or the object becomes inert
        formats.read(tmp_path / "c.pt", base_latent_size=8)
    assert not CANARY.exists()
    assert not (tmp_path / f"{CANARY}.npy").exists()


def test_an_archive_of_a_later_version_is_refused(tmp_path):
    data = bytearray(saved(content()))
    data[data.index(b"PK\x01\x02") + 6] = 255  # the version that is needed to extract the first entry
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"c.pt cannot be read: it is not a PyTorch checkpoint, or it is truncated"):
        formats.read(tmp_path / "c.pt", base_latent_size=8)


def test_an_index_with_a_name_that_is_too_long_is_refused(tmp_path):
    index = {"metadata": {}, "weight_map": {"cond_proj.weight": "9" * 400}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is missing; copy the complete checkpoint"):
        formats.read(tmp_path / "model.safetensors.index.json", base_latent_size=8)


def main() -> None:
    warnings.filterwarnings("ignore")
    count, files, put = KINDS[sys.argv[1]]
    attack_kind(sys.argv[1], count, files, attempt(put))


if __name__ == "__main__":
    main()
