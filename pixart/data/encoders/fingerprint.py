"""Which model a name means: a hash of a folder's files, or the hub's commit."""

import hashlib
from functools import cache
from pathlib import Path

from pixart.data.encoders.vae import split_hub_name

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of the files that make a model
WHOLE = 64 << 20  # bytes: files up to here are hashed whole, of larger ones SAMPLES parts and the size
SAMPLES, SAMPLE = 64, 64 << 10


@cache
def fingerprint(name: str) -> str:
    """16 hexadecimal digits for a model folder, or the commit that the hub's `owner/model/subfolder` stands at.

    Of a large file, evenly spread parts are read: other weights differ there too, and a task begins without
    reading gigabytes. Raises ValueError for what is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(contents(path))
        return digest.hexdigest()[:16]
    repository, subfolder = split_hub_name(name)
    try:
        from huggingface_hub import hf_hub_download

        cached = Path(hf_hub_download(repository, "config.json", subfolder=subfolder))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name!r} is neither a model folder nor a model that the hub gives: {reason}") from error
    return cached.parts[cached.parts.index("snapshots") + 1][:16]


def contents(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= WHOLE:
        return path.read_bytes()
    with path.open("rb") as file:
        parts = []
        for index in range(SAMPLES):
            file.seek((size - SAMPLE) * index // (SAMPLES - 1))
            parts.append(file.read(SAMPLE))
    return b"".join(parts)
