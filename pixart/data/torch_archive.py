"""Checks of `.pt` files before `torch.load` opens them."""

import zipfile
from pathlib import Path


def check_archive(path: Path, kind: str) -> None:
    """Raise ValueError, naming the `kind` of file, for a zip archive that `torch.save` cannot have written.

    Such entries are compressed, or claim more bytes than the file has: a decompression bomb.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: it is not a {kind}, or it is truncated") from error
    claimed_bytes = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or claimed_bytes > path.stat().st_size:
        raise ValueError(f"{path} cannot be read: its entries are compressed or overlap, so it is not from torch.save")
