"""The jobs that are disturbed: each as a function of its folder, which a forked process runs, and its results."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from conversion.convert import convert
from conversion.options import Options
from jobs.state.journal import Journal
from jobs.tasks import adopt, audit, caption, init_dataset, latents, sample
from pixart.atomic import SUFFIX
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import Recipe, load, to_json
from pixart.training.loop import train
from tests.attack.campaign import Campaign
from tests.jobs.tasks.test_sample import checkpoint_of
from tests.support import adoption, ranks
from tests.support.precomputed import write_torch_shards

SHARDS = [0, 1, 2, 3]


def run_caption(folder: str) -> None:
    caption.run(f"{folder}/data", SHARDS)


def run_latents(folder: str) -> None:
    latents.run(f"{folder}/data", SHARDS)


def run_audit(folder: str) -> None:
    audit.run(folder)


def run_adopt(folder: str) -> None:
    adopt.run(str(next(Path(folder).glob("datasets/*"))), [0, 1, 2])


def run_convert(folder: str) -> None:
    options = Options(num_batches=2, batch_size=8, overwrite=True)
    convert(f"{folder}/stage1", f"{folder}/stage1.fp8", options)


def run_train(folder: str) -> None:
    recipe = load(Path(folder) / "config.json")
    train(
        stage=1,
        model=recipe.model,
        config=recipe.stage1,
        dataset=recipe.data.path,
        run=folder,
        reporter=Journal(folder),
        stop=lambda: 0,
    )
    os.sync()


def run_sample(folder: str) -> None:
    sample.run(folder, checkpoint=f"{folder}/stage1", prompts=[], classes=[0, 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A job, its number of ranks, the state that it starts from, and the pattern of the files that it makes."""

    function: Callable[[str], None]
    prepare: Callable[[Recipe, Path], None]
    results: str
    ranks: int = 1


def with_dataset(recipe: Recipe, folder: Path, *, captions: bool = True, arrays: bool = True) -> None:
    """Write a run folder with a dataset in it, up to its captions or its latents."""
    here = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=str(folder / "data")))
    init_dataset.run(to_json(here))
    if captions:
        caption.run(here.data.path, SHARDS)
    if arrays:
        latents.run(here.data.path, SHARDS)
    (folder / "config.json").write_text(to_json(here))


def with_checkpoint(recipe: Recipe, folder: Path) -> None:
    with_dataset(recipe, folder)
    here = load(folder / "config.json")
    checkpoints.save(checkpoint_of(here, 1), folder / "stage1")


def with_shards(recipe: Recipe, folder: Path) -> None:
    source = write_torch_shards(folder / "source", "labels", [24, 24, 16])
    adoption.init(folder, source)


JOBS = {
    "caption": Job(
        function=run_caption,
        prepare=lambda recipe, folder: with_dataset(recipe, folder, captions=False, arrays=False),
        results="data/captions/*",
    ),
    "latents": Job(
        function=run_latents,
        prepare=lambda recipe, folder: with_dataset(recipe, folder, arrays=False),
        results="data/latents.zarr/**/*",
    ),
    "audit": Job(function=run_audit, prepare=with_dataset, results="data/audit/*"),
    "adopt": Job(function=run_adopt, prepare=with_shards, results="datasets/*/latents.zarr/**/*"),
    "convert": Job(function=run_convert, prepare=with_checkpoint, results="stage1.fp8/**/*.safetensors"),
    "train": Job(function=run_train, prepare=with_dataset, results="checkpoints/step-00000006/state/*.distcp", ranks=2),
    "sample": Job(function=run_sample, prepare=with_checkpoint, results="samples/*.png"),
}


def reset(template: Path, folder: Path) -> None:
    """Put the state that a job starts from into its folder, whose path stays the same."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)


def undisturbed(
    job: Job, recipe: Recipe, parent: Path, *, num_ranks: int | None = None
) -> tuple[Path, Path, dict[str, str]]:
    """Run a job undisturbed, and return the state it starts from, its folder, and its results.

    `num_ranks` replaces the job's number of ranks.
    """
    template, folder = parent / "template", parent / "work"
    folder.mkdir()
    job.prepare(recipe, folder)
    shutil.copytree(folder, template)
    ranks.run(num_ranks or job.ranks, job.function, str(folder))
    expected = results(folder, job)
    assert expected
    return template, folder, expected


def compare(attack: Campaign, label: str, job: Job, folder: Path, expected: dict[str, str]) -> None:
    """Record it if the results of a job have other bits than expected, or if it left temporary files behind."""
    if results(folder, job) != expected:
        attack.wrong(label, "its results have other bits")
    elif left := leftovers(folder):
        attack.wrong(label, f"left over: {left[:5]}")


def results(folder: Path, job: Job) -> dict[str, str]:
    """Return the SHA-256 of the files that a job has made, by their paths."""
    paths = [path for path in sorted(folder.glob(job.results)) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest() for path in paths}


def content(path: Path) -> bytes:
    """Return the content of a file; of the captions without the seconds that the job took."""
    if path.suffix != ".parquet":
        return path.read_bytes()
    table = pq.read_table(path)
    return repr(table.select([name for name in table.column_names if name != "seconds"]).to_pydict()).encode()


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith((SUFFIX, ".tmp"))]
