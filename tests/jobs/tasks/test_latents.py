import dataclasses
import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.state import ledger
from jobs.tasks import caption, init_dataset, latents
from pixart.config.dataset import DataConfig
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.encoders.text_encoder import TextEncoder, Tokenizer, load_tokenizer
from pixart.data.encoders.vae import encode, load_vae
from pixart.data.images.screening import decode, resize_and_crop
from pixart.data.sources.open import open_source
from pixart.data.store.zarr_store import Store
from pixart.recipes import demo


def test_short_captions_are_stored_beside_long_ones(tmp_path):
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, max_images=6, num_shards=2, short_captions=True)
    init_dataset.run(to_json(dataclasses.replace(recipe, data=data)))
    caption.run(data.path, [0, 1])
    latents.run(data.path, [0, 1])
    store = Store(manifests.read(data.path))
    encoder = TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
    parts = [pq.read_table(caption.part_path(data.path, shard)) for shard in range(2)]
    captions = [text for part in parts for text in part["short_caption"].to_pylist()]
    ids, mask = encoder.tokenize(captions)
    rows = np.arange(6)
    assert (store.read("short_token_ids", rows) == ids).all()
    assert (store.read("short_token_mask", rows) == mask).all()
    states = encoder.states(ids, mask).numpy()
    assert np.allclose(store.read("short_text_states", rows), states, atol=2e-2)


@pytest.fixture
def photographs(tmp_path) -> DataConfig:
    """Dataset configuration with two captioned shards, whose images are the files 0.png to 5.png."""
    (tmp_path / "images").mkdir()
    for index, item in enumerate(open_source("demo", max_images=6, image_size=64).read(0, 6)):
        (tmp_path / f"images/{index}.png").write_bytes(item.data)
        (tmp_path / f"images/{index}.txt").write_text(item.text)
    data = dataclasses.replace(demo(str(tmp_path)).data, source=f"{tmp_path}/images", max_images=None, num_shards=2)
    init_dataset.run(to_json(dataclasses.replace(demo(str(tmp_path)), data=data)))
    caption.run(data.path, [0, 1])
    return data


def test_text_encoder_is_loaded_only_to_store_embeddings(photographs, tmp_path, monkeypatch):
    data = dataclasses.replace(photographs, path=str(tmp_path / "other"), store_text_embeddings=False)
    init_dataset.run(to_json(dataclasses.replace(demo(str(tmp_path)), data=data)))
    caption.run(data.path, [0, 1])
    monkeypatch.setattr("pixart.data.encoders.text_encoder.load_text_model", None)
    latents.run(data.path, [0, 1])
    ids = Store(manifests.read(data.path)).read("token_ids", np.arange(6))
    texts = [text for shard in range(2) for text in caption.read_part(data.path, shard)["caption"].to_pylist()]
    tokenizer = Tokenizer(load_tokenizer(data.text_encoder), max_tokens=data.max_text_tokens)
    assert (ids == tokenizer.tokenize(texts)[0]).all()


def test_an_image_that_was_added_is_no_item_of_the_dataset(photographs):
    folder = Path(photographs.source)
    shutil.copy(folder / "1.png", folder / "+.png")
    latents.run(photographs.path, [0, 1])
    assert sorted(ledger.shards(photographs.path, "latents")) == [0, 1]


@pytest.mark.parametrize("change", ["removed", "renamed", "replaced"])
def test_images_that_are_not_those_captioned_are_refused(photographs, change):
    folder = Path(photographs.source)
    if change == "removed":
        (folder / "0.png").unlink()
    if change == "renamed":
        (folder / "1.png").rename(folder / "+.png")
    if change == "replaced":
        shutil.copy(folder / "1.png", folder / "0.png")
    expected = {
        "removed": "0.png is missing, but was there when it was listed",
        "renamed": "1.png is missing, but was there when it was listed",
        "replaced": "0.png: the image changed since it was captioned",
    }
    with pytest.raises(ValueError, match=expected[change]):
        latents.run(photographs.path, [0, 1])
    assert 0 not in ledger.shards(photographs.path, "latents")


def test_items_that_the_source_no_longer_gives_are_refused(photographs):
    manifest = manifests.read(photographs.path)
    items = list(manifests.open_images(manifest).read(*manifest.shard_range(0)))[:-1]
    table = caption.read_part(photographs.path, 0).to_pydict()
    with pytest.raises(ValueError, match=r"row 2 was 2\.png, now None"):
        list(latents.encoded(manifest, items, table, np.zeros(3, int), load_vae(photographs.vae)))


def test_large_jpegs_have_the_latents_of_all_their_pixels(tmp_path):
    """JPEGs are decoded at twice the target size or more, so latents differ only by the resampling filter."""
    (tmp_path / "images").mkdir()
    data = dataclasses.replace(demo(str(tmp_path)).data, source=f"{tmp_path}/images", max_images=None, num_shards=1)
    for item in open_source("demo", max_images=1, image_size=16 * data.image_size).read(0, 1):
        Image.open(io.BytesIO(item.data)).convert("RGB").save(tmp_path / "images/0.jpg", quality=95)
        (tmp_path / "images/0.txt").write_text(item.text)
    init_dataset.run(to_json(dataclasses.replace(demo(str(tmp_path)), data=data)))
    caption.run(data.path, [0])
    latents.run(data.path, [0])
    image = decode((tmp_path / "images/0.jpg").read_bytes(), data.screening)
    full = encode(
        load_vae(data.vae), np.array(resize_and_crop(image, data.image_size, data.image_size))[None], data.pixel_range
    )
    stored = Store(manifests.read(data.path)).read("latents", np.arange(1))
    assert np.abs(stored - full).mean() < 0.02 * np.abs(full).mean()


def test_removed_arrays_and_captions_are_made_again(small_recipe, tmp_path):
    """The ledger's entries alone do not make a shard complete: its data must exist."""
    dataset = tmp_path / "data"
    shutil.copytree(small_recipe.data.path, dataset)
    manifest = manifests.read(dataset)
    before = Store(manifest).read("latents", np.arange(manifest.images))
    shutil.rmtree(dataset / "latents.zarr")
    assert ledger.current(dataset, "latents", [0, 1, 2, 3], manifest.hash) == set()
    latents.run(str(dataset), [0, 1, 2, 3])
    assert np.array_equal(Store(manifest).read("latents", np.arange(manifest.images)), before)

    (dataset / "captions" / "00002.parquet").unlink()
    assert ledger.current(dataset, "caption", [0, 1, 2, 3], manifest.hash) == {0, 1, 3}
    caption.run(str(dataset), [0, 1, 2, 3])
    assert ledger.current(dataset, "caption", [0, 1, 2, 3], manifest.hash) == {0, 1, 2, 3}
