"""Fingerprints of models: a hash of a folder's files, or the commit of a hub repository."""

import hashlib
from functools import cache
from pathlib import Path

from pixart.data.encoders.vae import split_hub_name

SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of the files that define a model
MAX_FULL_HASH_BYTES = 64 << 20  # of larger files, only the size and NUM_SAMPLES samples are hashed
NUM_SAMPLES, SAMPLE_BYTES = 64, 64 << 10


@cache
def fingerprint(name: str) -> str:
    """Return 16 hexadecimal digits that identify the files of a model folder or of a hub name.

    For a folder this is a hash of its files; of large files, only evenly spaced samples are read, so that a task does
    not read gigabytes at its start. For `owner/model/subfolder` on the hub it is the commit.
    Raises ValueError if the name is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(sampled_content(path))
        return digest.hexdigest()[:16]
    repository, subfolder = split_hub_name(name)
    try:
        from huggingface_hub import hf_hub_download

        cached = Path(hf_hub_download(repository, "config.json", subfolder=subfolder))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name!r} is neither a model folder nor a model on the hub: {reason}") from error
    return cached.parts[cached.parts.index("snapshots") + 1][:16]


def sampled_content(path: Path) -> bytes:
    """Return the content of a small file, or evenly spaced samples of a large one."""
    size = path.stat().st_size
    if size <= MAX_FULL_HASH_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        parts = []
        for index in range(NUM_SAMPLES):
            file.seek((size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)
