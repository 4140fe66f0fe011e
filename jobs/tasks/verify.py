"""The verify job: compare the data of every shard with the ledger's checksums."""

from pathlib import Path

from jobs.progress import ProgressLine
from jobs.state import ledger
from pixart.config import recipe as recipe_file


def run(run_folder: str) -> dict[str, list[int]]:
    """Verify all shards, and return the altered ones by job.

    Their ledger entries are removed, so that the caption and latents jobs process them again.
    """
    from pixart.data import manifest as manifests
    from pixart.data.store.zarr_store import Store

    recipe = recipe_file.load(Path(run_folder) / "config.json")
    dataset = recipe.data.path
    manifest = manifests.read(dataset)
    store = Store(manifest) if ledger.shards(dataset, "latents") else None
    altered: dict[str, list[int]] = {"caption": [], "latents": []}
    with ProgressLine("verify", manifest.data.num_shards) as line:
        for shard in range(manifest.data.num_shards):
            if not captions_match(dataset, shard):
                altered["caption"].append(shard)
            if store and not latents_match(store, shard):
                altered["latents"].append(shard)
            line.update(shard + 1, "")
    for job, shards in altered.items():
        for shard in shards:
            ledger.path(dataset, job, shard).unlink()
    return altered


def captions_match(dataset: str, shard: int) -> bool:
    """Return whether the captions of a shard match the ledger; true if the ledger has no entry."""
    from jobs.tasks.caption import read_part

    if ledger.read(dataset, "caption", shard) is None:
        return True
    try:
        read_part(dataset, shard)
    except ValueError:
        return False
    return True


def latents_match(store, shard: int) -> bool:
    """Return whether the arrays of a shard match the ledger; true if the ledger has no entry."""
    from jobs.tasks import adopt, latents

    entry = ledger.read(store.manifest.data.path, "latents", shard)
    if entry is None:
        return True
    try:
        columns = store.read_shard(shard)
    except ValueError:
        return False
    checksum = adopt.checksum if store.manifest.adopted else latents.checksum
    return checksum(columns) == entry.checksum
