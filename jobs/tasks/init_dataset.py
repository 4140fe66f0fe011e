"""The init job: write a dataset's manifest and empty arrays, once, before any other task."""

from pixart.config.recipe import from_json


def run(recipe: str) -> None:
    """Create the dataset of a recipe, which is given as JSON.

    Raises ValueError, with nothing written, if the source, the VAE or the text encoder does not exist, or for an aspect
    bucket that the VAE or the model's patch does not divide.
    """
    from pixart.data import manifest as manifests
    from pixart.data.store import zarr_store

    configuration = from_json(recipe)
    manifest = manifests.make(configuration.data, configuration.model.patch_size)
    zarr_store.create(manifest)
    manifests.write(manifest)


def resize(recipe: str, origin: str) -> None:
    """Create the dataset of a recipe, given as JSON, with the rows and captions of the dataset `origin`.

    Raises ValueError, with nothing written, as `pixart.data.resized.make` does.
    """
    from pixart.data import manifest as manifests
    from pixart.data import resized
    from pixart.data.store import zarr_store

    configuration = from_json(recipe)
    manifest = resized.make(manifests.read(origin), configuration.data, configuration.model.patch_size)
    zarr_store.create(manifest)
    manifests.write(manifest)
