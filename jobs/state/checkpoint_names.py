"""Checkpoint directories as the launcher sees them: by names and sizes, without torch."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.state.json_record import read_record

MARKER = "training.json"  # written last
INFERENCE = "inference.json"  # of FP8 weights for inference
WEIGHTS = "diffusion_pytorch_model.safetensors"
FOREIGN = (".metadata", WEIGHTS)  # of torch.distributed.checkpoint, of diffusers
CONVERTED = (f"transformer/{WEIGHTS}", f"ema/{WEIGHTS}", "optimizer.safetensors")  # of what the conversion wrote
KEYS = ("stage", "step", "config", "dataset", "provenance", "plan", "files")


def find_checkpoint(name: str, *, or_older: bool = False) -> Path:
    """A checkpoint directory, or the newest of a run folder; looks at names, marker and the length of the weights.

    Raises ValueError where it is damaged; or where they all are, of a run that may go on from an older one.
    """
    path = Path(name).absolute()
    found = (
        [path]
        if (path / MARKER).exists()
        else sorted(item.parent for item in path.glob(f"checkpoints/step-{8 * '[0-9]'}/{MARKER}"))
    )
    if not path.exists():
        raise ValueError(f"checkpoint {name}: no such file or directory")
    if not found:
        hint = "; a .pt file goes through `python -m conversion.to_fp8` first" if path.is_file() else ""
        raise ValueError(f"{name} is no checkpoint directory and no run with one{hint}")
    faults = []
    for directory in reversed(found if or_older else found[-1:]):
        try:
            check_lengths(directory)
            return directory
        except ValueError as error:
            faults.append(error)
    raise faults[0]


def find_weights(name: str) -> tuple[Path, dict[str, Any]]:
    """What can be sampled from, a checkpoint or FP8 weights for inference, with its record."""
    path = Path(name).absolute()
    if (path / INFERENCE).exists():
        check_lengths(path)
        return path, read_record(path / INFERENCE, "stage", "step", "dataset")
    path = find_checkpoint(name)
    return path, checkpoint_record(path)


def checkpoint_record(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises ValueError for one that is damaged."""
    return read_record(directory / MARKER, *KEYS)


def acceptance(provenance: Mapping[str, Any]) -> str | None:
    """Return the verdict of a conversion's acceptance checks, PASS or FAIL; None if there was no conversion."""
    return provenance.get("acceptance", provenance.get("gate"))  # "gate" in checkpoints of an earlier version


def is_foreign(directory: Path) -> bool:
    """Whether it is a checkpoint of another kind than the suite's, which the conversion reads too."""
    return any((directory / name).exists() for name in FOREIGN)


def check_file(path: Path) -> None:
    """Raises ValueError for what is neither safetensors nor a zip archive, as torch.save writes, or not all of it."""
    if zipfile.is_zipfile(path):
        return
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            raise ValueError(f"{path} cannot be read: it is no PyTorch checkpoint, or a truncated one")
    check_length(path)


def check_lengths(directory: Path) -> None:
    for file in sorted(directory.rglob("*.safetensors")):
        check_length(file)
    files = checkpoint_record(directory)["files"] if (directory / MARKER).exists() else {}
    if (directory / MARKER).exists() and not files:
        for name in CONVERTED:
            if not (directory / name).is_file():
                raise ValueError(f"{directory / name} is missing: the checkpoint was not copied whole")
    for name, (length, _) in files.items():
        file = directory / "state" / name
        if not file.exists() or file.stat().st_size != length:
            raise ValueError(f"{file} is missing, damaged or truncated")


def check_length(file: Path) -> None:
    """Raises ValueError unless a safetensors file is as long as its header says."""
    length = file.stat().st_size
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(header_length, length)))
            end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
        except (ValueError, AttributeError, TypeError, LookupError):
            end = -1
    if length != 8 + header_length + end:
        raise ValueError(f"{file} is damaged or truncated")
