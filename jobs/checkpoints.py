"""Checkpoint directories as the launcher sees them: by names and sizes, without torch."""

import json
from pathlib import Path
from typing import Any

MARKER = "training.json"  # written last
INFERENCE = "inference.json"  # of FP8 weights for inference


def find_checkpoint(name: str) -> Path:
    """A checkpoint directory, or the newest of a run folder; looks at names, marker and the length of the weights."""
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
    check_lengths(found[-1])
    return found[-1]


def find_weights(name: str) -> tuple[Path, dict[str, Any]]:
    """What can be sampled from, a checkpoint or FP8 weights for inference, with its record."""
    path = Path(name).absolute()
    if (path / INFERENCE).exists():
        check_lengths(path)
        return path, json.loads((path / INFERENCE).read_text())
    path = find_checkpoint(name)
    return path, json.loads((path / MARKER).read_text())


def check_lengths(directory: Path) -> None:
    for file in sorted(directory.rglob("*.safetensors")):
        check_length(file)
    record = directory / MARKER
    for name, (length, _) in (json.loads(record.read_text())["files"] if record.exists() else {}).items():
        file = directory / "state" / name
        if not file.exists() or file.stat().st_size != length:
            raise ValueError(f"{file} is missing, damaged or truncated")


def check_length(file: Path) -> None:
    """Raises ValueError unless a safetensors file is as long as its header says."""
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_length))
        except ValueError as error:
            raise ValueError(f"{file} is damaged or truncated") from error
    end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size != 8 + header_length + end:
        raise ValueError(f"{file} is damaged or truncated")
