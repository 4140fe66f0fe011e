"""Checkpoint directories as the launcher sees them: by names and sizes, without torch."""

import json
from pathlib import Path

MARKER = "training.json"  # written last


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
    for file in sorted(found[-1].rglob("*.safetensors")):
        check_length(file)
    return found[-1]


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


def converted(source: Path) -> Path:
    """Beside its source."""
    return source.with_name(f"{source.stem if source.is_file() else source.name}.fp8")
