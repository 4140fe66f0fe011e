"""Recognition of the format of `torch.save` before version 1.6: pickles, of which the first is a magic number."""

from pathlib import Path

MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
HEAD_SIZE = 32  # bytes, within which the magic number is


def is_pickle_format(path: Path) -> bool:
    """Return whether a file has the format of `torch.save` before version 1.6."""
    with path.open("rb") as file:
        return MAGIC in file.read(HEAD_SIZE)
