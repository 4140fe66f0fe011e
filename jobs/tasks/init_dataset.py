"""The init job: fixes a dataset's manifest and makes its empty arrays, once, before any task."""

from pixart.config.recipe import from_json


def run(recipe: str) -> None:
    """Raises ValueError, with nothing written, for a source, VAE or text encoder that is not there."""
    from pixart.data import manifest as manifests
    from pixart.data.store import zarr_store

    manifest = manifests.make(from_json(recipe).data)
    zarr_store.create(manifest)
    manifests.write(manifest)
