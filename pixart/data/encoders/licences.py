"""Licences of models on disk. Imports no torch."""

import re
from pathlib import Path

from pixart.data.encoders.vae import cached_folder


def licence(folder: Path) -> str:
    """Return the licence that a model's card names; that of a subfolder is the card of the whole repository."""
    for place in (folder, *folder.parents):
        if (place / "README.md").is_file():
            card = re.match(r"---\n(.*?)\n---", (place / "README.md").read_text(errors="replace"), re.DOTALL)
            names = dict(re.findall(r"^(license(?:_name)?): *(.+)$", card[1], re.MULTILINE)) if card else {}
            return names.get("license_name") or names.get("license") or "not named by its card"
        if place.parent.name == "snapshots":
            break
    return "not recorded"


def licence_of(name: str) -> str:
    """Return the licence of a model by folder or hub name, as its card on disk names it."""
    folder = Path(name) if Path(name).is_dir() else cached_folder(name)
    return licence(folder) if folder else "not recorded"
