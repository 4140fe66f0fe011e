"""Datasets of other sizes that take over the captions of one: `latents --from`."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jobs import launch
from jobs.reports.lineage import topological_order, trace
from jobs.state import ledger
from jobs.tasks import audit, caption, init_dataset, latents, verify
from jobs.tasks.caption import part_path
from pixart.config.keys import overrides
from pixart.config.recipe import Recipe, to_json
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from pixart.recipes import demo
from tests.support.bucketed_recipe import write_images
from tests.support.environment import bare_environment

pytestmark = pytest.mark.slow

BUCKETS = "128x128,192x96,96x192"
CHANGES = ["data.image_size=128", f"data.aspect_buckets={BUCKETS}"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Recipe:
    """Recipe of a dataset of 18 images of six shapes in 2 shards, with captions and latents of 64 pixels squared."""
    home = tmp_path_factory.mktemp("resizing")
    write_images(home / "images", 18)
    recipe = demo(str(home))
    data = dataclasses.replace(
        recipe.data, path=str(home / "small"), source=str(home / "images"), max_images=None, num_shards=2
    )
    recipe = dataclasses.replace(recipe, data=data)
    init_dataset.run(to_json(recipe))
    caption.run(data.path, [0, 1])
    latents.run(data.path, [0, 1])
    return recipe


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of a user without Slurm."""
    for name, value in {**bare_environment(), "PIXART_CLUSTER": "local"}.items():
        monkeypatch.setenv(name, value)


def resized(origin: Recipe, folder: Path, *changes: str) -> Recipe:
    """Create a dataset with the captions of another one, and return its recipe."""
    recipe = overrides.apply(origin, [f"data.path={folder}", *(changes or CHANGES)])
    init_dataset.resize(to_json(recipe), origin.data.path)
    return recipe


def test_the_command_creates_a_dataset_of_another_size(origin, local, capfd):
    """It has the same captions, nothing is captioned, and its latents are those of a dataset that is made anew."""
    home = Path(origin.data.path).parent
    words = ["--home", str(home), *(word for change in CHANGES for word in ("--set", change))]
    assert launch.main(["latents", "--from", origin.data.path, *words]) == 0
    path = f"{origin.data.path}-128"
    assert f"latents: 2 shards, 18 of 18 images valid, in {path}/latents.zarr" in capfd.readouterr().out
    for shard in range(2):
        assert part_path(path, shard).read_bytes() == part_path(origin.data.path, shard).read_bytes()
    again = overrides.apply(origin, [f"data.path={home}/anew", *CHANGES])
    init_dataset.run(to_json(again))
    caption.run(again.data.path, [0, 1])
    latents.run(again.data.path, [0, 1])
    stores = [Store(manifests.read(folder)) for folder in (path, again.data.path)]
    for shard in range(2):
        columns, expected = (store.read_shard(shard) for store in stores)
        assert columns.keys() == expected.keys()
        for name, values in columns.items():  # another process rounds differently
            assert np.allclose(values.astype(float), expected[name].astype(float), atol=2e-2), name
    ledger.require_complete(path)
    manifest = manifests.read(path)
    assert manifest.captions_from is not None
    assert manifest.captions_from.hash == manifests.read(origin.data.path).hash != manifest.hash
    assert dataclasses.replace(manifest, captions_from=None).image_shapes == stores[1].manifest.image_shapes
    nodes = topological_order(trace(home, path))
    assert [(node.kind, node.name) for node in nodes] == [("dataset", origin.data.path), ("dataset", path)]
    assert "hash" in nodes[1].facts["captions"]


def test_audit_and_verification(origin, tmp_path):
    """The audit counts the crops of the new shapes; an altered part is taken over again."""
    recipe = resized(origin, tmp_path / "large")
    latents.run(recipe.data.path, [0, 1])
    run = tmp_path / "run"
    run.mkdir()
    lenient = overrides.apply(recipe, ["audit.max_same_opening=1"])
    (run / "config.json").write_text(to_json(lenient))
    audit.run(str(run))
    audit.require(recipe.data.path)
    shapes = json.loads((tmp_path / "large/audit/audit.json").read_text())["shapes"]
    assert [(shape["width"], shape["height"]) for shape in shapes] == [(192, 96), (128, 128), (96, 192)]
    assert sum(shape["images"] for shape in shapes) == 18
    part = part_path(recipe.data.path, 1)
    part.write_bytes(part.read_bytes()[:-100])
    assert verify.run(str(run)) == {"caption": [1], "latents": []}
    caption.run(recipe.data.path, [0, 1])
    assert part.read_bytes() == part_path(origin.data.path, 1).read_bytes()
    ledger.require_complete(recipe.data.path)


def test_the_hash_does_not_depend_on_the_paths(origin, tmp_path):
    one = manifests.read(resized(origin, tmp_path / "one").data.path)
    assert one.captions_from is not None
    moved = dataclasses.replace(one.captions_from, path="elsewhere")
    assert dataclasses.replace(one, captions_from=moved).hash == one.hash
    assert dataclasses.replace(one, captions_from=None).hash != one.hash
    assert one.captions_from.path == origin.data.path


def test_shards_that_have_no_captions_to_take_over(origin, tmp_path):
    bare = overrides.apply(origin, [f"data.path={tmp_path}/bare"])
    init_dataset.run(to_json(bare))
    caption.run(bare.data.path, [0])
    recipe = overrides.apply(bare, [f"data.path={tmp_path}/large", *CHANGES])
    init_dataset.resize(to_json(recipe), bare.data.path)
    latents.run(recipe.data.path, [0])
    with pytest.raises(ValueError, match="1 of 1 shards have no captions to take over, such as 1; run 'caption "):
        latents.run(recipe.data.path, [1])
    manifest = tmp_path / "bare/manifest.json"
    manifest.rename(tmp_path / "manifest.json")
    with pytest.raises(
        ValueError, match=r"its hash is not [0-9a-f]+, so its captions cannot be reused; restore the dataset"
    ):
        caption.run(recipe.data.path, [1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from {home}/nowhere", "nowhere: is not a dataset on a file system; run 'caption' to create one"),
        ("--from s3://bucket/small", "is not a dataset on a file system"),
        ("--from {home}/small", "the new dataset has the same data.image_size; name it by --dataset"),
        ("--from {home}/small --dataset {home}/small --set data.image_size=128", "is the dataset of --dataset"),
        ("--from {home}/small --set data.image_size=100", "data.image_size=100: must be a multiple of 8"),
        ("--from {home}/small --set data.aspect_buckets=64x64,96x44 --dataset new", "that are multiples of 8"),
        ("--from {home}/small --set data.aspect_buckets=64x64,72x56 --dataset new", "that are multiples of 16"),
        ("--from {home}/small --set data.aspect_buckets=64x64,64x64 --dataset new", "is listed twice"),
        ("--from {home}/small --set data.image_size=128 --set data.num_shards=3", "data.num_shards=3: the dataset"),
        ("--from {home}/small --set data.image_size=128 --set data.captioner=vllm", "data.captioner='vllm'"),
        ("--from {home}/small --set data.image_size=128 --set data.screening.min_side=9", "data.screening="),
        ("--from {home}/small --set data.image_size=128 --array 0-2", "shard 2 does not exist"),
        ("--from {home}/small --set data.image_size=128 --set data.vae=/no/vae", "/no/vae"),
        ("--from {home}/other --set data.image_size=128", "2 of 2 shards have no captions to take over"),
        ("--from {home}/small --set data.image_size=128 --dataset {home}/other", "did not take over the captions"),
        ("--from {home}/scenes --set data.image_size=128", "data.image_size=128: the dataset"),
    ],
)
def test_refused_in_one_line_with_nothing_written(origin, local, tmp_path, monkeypatch, capfd, words, message):
    monkeypatch.chdir(tmp_path)
    home = Path(origin.data.path).parent
    for name, changes in (("other", []), ("scenes", ["data.source=demo", "data.max_images=4"])):
        if not (home / name).exists():
            init_dataset.run(to_json(overrides.apply(origin, [f"data.path={home}/{name}", *changes])))
    before = sorted(home.rglob("*"))
    try:
        code = launch.main(["latents", "--home", str(tmp_path / "home"), *words.format(home=home).split(" ")])
    except SystemExit as stopped:
        code = stopped.code
    errors = capfd.readouterr().err
    assert code == 2, errors
    assert message in errors
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert sorted(home.rglob("*")) == before
    assert not list(tmp_path.iterdir())
