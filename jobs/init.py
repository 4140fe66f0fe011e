"""The init job: fixes a dataset's manifest and makes its empty arrays, once, before any task."""

from pixart.config import from_json


def run(recipe: str) -> None:
    """Raises ValueError, with nothing written, for a source, VAE or text encoder that is not there."""
    from pixart.data import manifest as manifests
    from pixart.data import store

    manifest = manifests.make(from_json(recipe).data)
    store.create(manifest)
    manifests.write(manifest)
