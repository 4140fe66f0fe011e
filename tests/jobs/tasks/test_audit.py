"""The audit of a dataset with every kind of fault, and its effect on training and `verify`."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.state import audit_files, ledger
from jobs.tasks import audit, caption, init_dataset, latents, verify
from jobs.tracking.mlflow_store import read_journal
from pixart.config.dataset import DataConfig
from pixart.config.recipe import Recipe, from_json, to_json
from pixart.recipes import demo

SHARDS = 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    """Recipe of a dataset with solid-color, duplicate, truncated and unreadable images."""
    home = tmp_path_factory.mktemp("audit")
    images = home / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for index in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 80), Image.Resampling.BICUBIC).save(images / f"{index:02d}.png")
    for index in range(20, 25):
        Image.new("RGB", (96, 80), (40 * (index - 19), 9, 9)).save(images / f"{index}.png")
    (images / "25.png").write_bytes((images / "03.png").read_bytes())
    Image.open(images / "04.png").save(images / "26.jpg", quality=70)
    (images / "27.png").write_bytes((images / "05.png").read_bytes()[:900])
    (images / "28.png").write_text("no image")
    for path in (*images.glob("[01]*.png"), images / "25.png", images / "26.jpg"):
        path.with_suffix(".txt").write_text(f"a coarse pattern of many colours, number {path.stem}. It is soft.")
    made = demo(str(home))
    data = DataConfig(path=f"{home}/data", source=str(images), num_shards=SHARDS, image_size=64, max_text_tokens=8)
    made = dataclasses.replace(made, data=data)
    init_dataset.run(to_json(made))
    caption.run(data.path, list(range(SHARDS)))
    latents.run(data.path, list(range(SHARDS)))
    return made


def run(recipe: Recipe, folder, **limits: float) -> None:
    """Audit the dataset with these limits, and `folder` as the run folder."""
    settings = dataclasses.replace(recipe, audit=dataclasses.replace(recipe.audit, **limits))
    (folder / "config.json").write_text(to_json(settings))
    assert from_json(to_json(settings)) == settings
    audit.run(str(folder))


def test_page_and_verdict(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"^dataset .*: failed its audit, solid-color or uniform 0\.1724, limit"):
        run(recipe, tmp_path, max_rejected=0.3)
    folder = tmp_path.parent / recipe.data.path / audit_files.FOLDER
    summary = json.loads((folder / audit_files.SUMMARY).read_text())
    assert (summary["rows"], summary["valid"]) == (29, 22)
    assert summary["reasons"] == {"plain": 5, "truncated": 1, "unreadable": 1}
    assert summary["duplicates"] == {"exact": {"groups": 1, "rows": 2}, "near": {"groups": 1, "rows": 2}}
    for name, histogram in summary["histograms"].items():
        assert sum(histogram["counts"]) == 22, name
    assert summary["first_words"] == {"a coarse pattern": 22}
    rows = pq.read_table(folder / audit_files.DUPLICATES).to_pylist()
    assert [(row["kind"], row["row"]) for row in rows] == [("exact", 3), ("exact", 25), ("near", 4), ("near", 26)]

    page = (folder / audit_files.PAGE).read_text()
    assert page.count("data:image/jpeg") >= 5 + 22 + 4 + 16  # solid-color, accepted, duplicates, longest and shortest
    for heading in ("Shortest captions", "Longest captions", "Accepted images"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count(": a coarse pattern") == 22 + 16  # whole captions, to read beside their images
    assert "FAIL" in page
    assert "http" not in page.replace("http-equiv", "")
    lines, _ = read_journal(tmp_path)
    metrics = {key: value for line in lines for key, value in line.get("metrics", {}).items()}
    assert metrics["data/num_valid"] == 22
    assert metrics["data/rejected_plain"] == pytest.approx(5 / 29)
    assert {line["artifact"].rpartition("/")[2] for line in lines if "artifact" in line} >= {audit_files.PAGE}


def test_training_requires_an_audit(recipe, tmp_path):
    folder = tmp_path.parent / recipe.data.path / audit_files.FOLDER
    with pytest.raises(ValueError, match="failed its audit, rejected"):
        run(recipe, tmp_path, max_same_opening=0.5)
    with pytest.raises(
        ValueError, match=r"failed its audit \(rejected, solid-color or uniform, captions with the same"
    ):
        audit.require(recipe.data.path)
    run(recipe, tmp_path, max_rejected=1, max_plain=1, max_duplicates=1, max_same_opening=1)
    audit.require(recipe.data.path)

    entry = ledger.read(recipe.data.path, "caption", 0)
    ledger.record(recipe.data.path, "caption", 0, dataclasses.replace(entry, checksum="another"))
    with pytest.raises(ValueError, match="has changed since its audit"):
        audit.require(recipe.data.path)
    ledger.record(recipe.data.path, "caption", 0, entry)
    audit.require(recipe.data.path)
    (folder / audit_files.SUMMARY).unlink()
    with pytest.raises(ValueError, match="has not been audited"):
        audit.require(recipe.data.path)


def test_missing_captions_are_named(recipe, tmp_path):
    entry = ledger.read(recipe.data.path, "caption", 1)
    ledger.path(recipe.data.path, "caption", 1).unlink()
    with pytest.raises(ValueError, match="1 of 3 shards have no captions yet, such as 1"):
        run(recipe, tmp_path)
    ledger.record(recipe.data.path, "caption", 1, entry)


def test_verify_detects_altered_shards_which_are_recreated(recipe, tmp_path):
    (tmp_path / "config.json").write_text(to_json(recipe))
    assert verify.run(str(tmp_path)) == {"caption": [], "latents": []}

    part = caption.part_path(recipe.data.path, 1)
    original = part.read_bytes()
    part.write_bytes(original[:-1])
    chunk = next(path for path in (latents_folder(recipe) / "c" / "2").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[100] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.parquet: does not match the ledger"):
        caption.read_part(recipe.data.path, 1)
    assert verify.run(str(tmp_path)) == {"caption": [1], "latents": [2]}
    assert ledger.shards(recipe.data.path, "caption") == {0, 2}
    assert ledger.shards(recipe.data.path, "latents") == {0, 1}

    caption.run(recipe.data.path, list(range(SHARDS)))
    latents.run(recipe.data.path, list(range(SHARDS)))
    assert verify.run(str(tmp_path)) == {"caption": [], "latents": []}


def latents_folder(recipe: Recipe):
    from pathlib import Path

    return Path(recipe.data.path) / "latents.zarr" / "latents"
