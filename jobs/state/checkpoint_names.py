"""Identification of checkpoint directories by file names and sizes, without importing torch."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion.reading import orbax_metadata
from conversion.reading.folders import layout
from conversion.reading.pickle_format import is_pickle_format
from pixart import records
from pixart.config.checkpoint_metadata import MARKER, InferenceRecord, read_record
from pixart.records import Header
from pixart.relocation import home_of, present

INFERENCE = "inference.json"  # metadata of FP8 weights for inference
WEIGHTS = "diffusion_pytorch_model.safetensors"
FOREIGN = (".metadata", WEIGHTS)  # written by torch.distributed.checkpoint and by diffusers
CONVERTED = (f"transformer/{WEIGHTS}", f"ema/{WEIGHTS}", "optimizer.safetensors")  # files of a converted checkpoint


def find_checkpoint(name: str, *, or_older: bool = False) -> Path:
    """Return a checkpoint directory, or the newest checkpoint of a run folder.

    Checks the marker and the lengths of the files, not their contents. With `or_older`, the newest undamaged checkpoint
    of a run is returned. Raises ValueError if there is no checkpoint, or if every checkpoint considered is damaged.
    """
    path = Path(name).absolute()
    candidates = (
        [path]
        if (path / MARKER).exists()
        else sorted(item.parent for item in path.glob(f"checkpoints/step-{8 * '[0-9]'}/{MARKER}"))
    )
    if not path.exists():
        raise ValueError(f"checkpoint {name}: no such file or directory; name a checkpoint directory or a run folder")
    if not candidates:
        hint = "; convert a .pt file by `python -m conversion.to_fp8`" if path.is_file() else ""
        raise ValueError(f"{name}: no checkpoint directory and no run with a checkpoint{hint}")
    errors = []
    for directory in reversed(candidates if or_older else candidates[-1:]):
        try:
            check_lengths(directory)
            return directory
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def find_weights(name: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the path and metadata of weights to sample from: a checkpoint, or FP8 weights for inference.

    The metadata of a checkpoint of another program is None: reading it needs torch. Raises ValueError if `name` is
    neither, or is damaged.
    """
    path = Path(name).absolute()
    if (path / INFERENCE).exists():
        check_lengths(path)
        return path, present(records.read(path / INFERENCE, InferenceRecord), home_of(path))
    if path.is_file():
        check_file(path)
        return path, None
    if path.is_dir() and not (path / MARKER).exists() and is_foreign(path):
        check_lengths(path)
        return orbax_metadata.find(path) or path, None
    path = find_checkpoint(name)
    return path, checkpoint_record(path)


def checkpoint_record(directory: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint, with files by their paths relative to it.

    In format 1, of version 0.1, the metadata has no checksum and files are named relative to the folder `state`.
    Raises ValueError if it is damaged.
    """
    return present(read_record(directory), home_of(directory))


def acceptance(provenance: Mapping[str, Any]) -> str | None:
    """Return the verdict of a conversion's acceptance checks, PASS or FAIL; None if there was no conversion."""
    return provenance.get("acceptance", provenance.get("gate"))  # checkpoints of an earlier version say "gate"


def is_foreign(directory: Path) -> bool:
    """Return whether a directory holds a checkpoint of another program, which the conversion can read."""
    return (
        any((directory / name).exists() for name in FOREIGN)
        or layout.is_state_folder(directory)
        or orbax_metadata.find(directory) is not None
    )


def check_file(path: Path) -> None:
    """Check that a file is a complete safetensors file, or has a format of torch.save: a zip archive, or pickles.

    Raises ValueError if it is neither, or is truncated.
    """
    if zipfile.is_zipfile(path) or is_pickle_format(path):
        return
    if layout.is_index(path):
        layout.files_of_index(path)
        return
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            raise ValueError(f"{path}: no PyTorch checkpoint, or truncated; use a .pt or .safetensors file")
    check_length(path)


def check_lengths(directory: Path) -> None:
    """Check that a checkpoint's files exist and have the lengths that were recorded.

    Raises ValueError for the first one that is missing, damaged or truncated. Of an Orbax checkpoint, the metadata and
    the roots of its databases are checked.
    """
    if orbax := orbax_metadata.find(directory):
        orbax_metadata.read_items(orbax)
    for file in sorted(directory.rglob("*.safetensors")):
        check_length(file)
    files = checkpoint_record(directory)["files"] if (directory / MARKER).exists() else {}
    if (directory / MARKER).exists() and not files:
        for name in CONVERTED:
            if not (directory / name).is_file():
                raise ValueError(f"{directory / name} is missing; copy the complete checkpoint")
    for name, (length, _) in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != length:
            raise ValueError(f"{file}: missing, damaged or truncated; use another checkpoint")


def check_length(file: Path) -> None:
    """Check that a safetensors file has the length that its header implies. Raises ValueError otherwise."""
    length = file.stat().st_size
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        try:
            header = records.parse(stream.read(min(header_length, length)), Header, str(file))
            end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
        except (ValueError, LookupError):
            end = -1
    if length != 8 + header_length + end:
        raise ValueError(f"{file}: damaged or truncated; use another checkpoint")
