"""The adopt job: exactly the valid rows of every form, the same bytes after a kill, the audit of what was adopted."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.state import ledger
from jobs.tasks import adopt, audit, caption, latents, verify
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.adoption.validity import Problem
from pixart.data.encoders.text_encoder import Tokenizer, load_tokenizer
from pixart.data.store.zarr_store import Store
from tests.support.adoption import adopted, init
from tests.support.precomputed import (
    IDS,
    MASKS,
    WIDTH,
    label_records,
    make_t5gemma,
    spoil,
    text_records,
    torch_entries,
    write_array_record,
    write_torch_shards,
)


def problems(manifest: manifests.Manifest, shard: int = 0) -> list[str]:
    return caption.read_part(manifest.data.path, shard)["reason"].to_pylist()


def files(folder: Path) -> dict[str, bytes]:
    """Return all files but the ledger, whose entries hold durations."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "ledger" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_shards_of_labels_of_different_lengths(tmp_path):
    lengths = [40, 25, 60]
    source = write_torch_shards(tmp_path / "shards", "labels", lengths)
    manifest = adopted(tmp_path, source)
    assert (manifest.rows_per_shard, manifest.images, manifest.data.num_shards) == (60, 125, 3)
    assert manifest.class_names == ("0", "1", "2", "3", "4")
    assert manifest.data.pixel_range == (0, 1)
    assert manifest.data.captioner == "adopted"
    assert manifest.models["captioner"].startswith("adopted-")
    store = Store(manifest)
    assert store.valid_rows().tolist() == [*range(40), *range(60, 85), *range(120, 180)]
    for shard, rows in enumerate(lengths):
        row_numbers = np.arange(*manifest.shard_range(shard))
        assert len(row_numbers) == rows
        expected = torch_entries("labels", rows, seed=shard)
        assert np.abs(store.read("latents", row_numbers) - expected["latents"].float().numpy()).max() <= 3e-8
        assert (store.read("label", row_numbers) == expected["labels"].numpy()).all()
        assert caption.read_part(manifest.data.path, shard)["id"].to_pylist()[-1] == f"shard_{shard:06d}.pt:{rows - 1}"
    stored = np.concatenate(
        [torch_entries("labels", n, seed=i)["latents"].float().numpy() for i, n in enumerate(lengths)]
    )
    recipe = manifests.read(manifest.data.path)
    channel = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, normalization="channel"))
    mean, std = Store(channel).statistics()
    assert np.allclose(mean, stored.mean((0, 2, 3)), atol=1e-5)
    assert np.allclose(std, stored.std((0, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("form", ["captions", "tokens"])
def test_token_ids_are_stored_unchanged_and_decoded(tmp_path, form):
    source = write_torch_shards(tmp_path / "shards", form, [30, 20])
    manifest = adopted(tmp_path, source, normalization="channel")
    assert manifest.data.max_text_tokens == WIDTH
    assert manifest.data.short_captions == (form == "captions")
    store, tokenizer = Store(manifest), load_tokenizer("minilm")
    assert store.valid_rows().tolist() == [*range(50)]
    for shard, rows in enumerate((30, 20)):
        entries, part = torch_entries(form, rows, seed=shard), caption.read_part(manifest.data.path, shard)
        for name, prefix in zip(IDS[form], ("", "short_"), strict=False):
            ids, mask = entries[name].numpy(), entries[MASKS[name]].numpy()
            row_numbers = np.arange(*manifest.shard_range(shard))
            assert (store.read(f"{prefix}token_ids", row_numbers) == ids).all()
            assert (store.read(f"{prefix}token_mask", row_numbers) == (mask == 1)).all()
            texts = [
                tokenizer.decode(row[kept == 1].tolist(), skip_special_tokens=True)
                for row, kept in zip(ids, mask, strict=True)
            ]
            assert part[f"{prefix}caption"].to_pylist() == texts
        assert part["label"].to_pylist() == [-1] * rows


def test_rows_that_were_never_filled_keep_their_place_with_a_reason(tmp_path):
    entries = torch_entries("captions", 64)
    spoil(entries, slice(50, 64))
    for name, value in entries.items():
        value[40:50] = 0
        assert name
    entries["long_caption_mask"][3] = 0
    entries["short_caption_mask"][4, :2] = torch.tensor([0, 1])
    entries["long_caption"][5, -1] = 30_522  # the size of the vocabulary
    entries["short_caption"][6, 0] = -1
    entries["latents"][7, 2, 3, 1] = float("nan")
    entries["latents"][8] = 0.25
    (tmp_path / "shards").mkdir()
    torch.save(entries, tmp_path / "shards/shard_000000.pt")
    manifest = adopted(tmp_path, tmp_path / "shards")
    invalid = {3, 4, 5, 6, 7, 8, *range(40, 64)}
    store, rows = Store(manifest), np.arange(64)
    assert set(range(64)) - set(store.valid_rows().tolist()) == invalid
    row_problems = problems(manifest)
    assert row_problems[3:9] == [Problem.MASK] * 2 + [Problem.VOCABULARY] * 2 + [Problem.NOT_FINITE, Problem.CONSTANT]
    assert row_problems[40:50] == [Problem.CONSTANT] * 10
    assert set(row_problems[50:]) == {Problem.NOT_FINITE}
    for name in ("latents", "token_ids", "short_token_mask"):
        assert not store.read(name, rows)[sorted(invalid)].any()
    assert ledger.read(manifest.data.path, "latents", 0).valid == 64 - len(invalid)


def test_labels_are_below_the_number_of_class_names(tmp_path):
    entries = torch_entries("labels", 20, classes=3)
    entries["labels"][4] = -1
    entries["labels"][19], entries["latents"][19] = 30_000, 0.0
    (tmp_path / "shards").mkdir()
    torch.save(entries, tmp_path / "shards/shard_000000.pt")
    manifest = adopted(tmp_path, tmp_path / "shards", names=("cat", "dog", "fish"))
    assert manifest.class_names == ("cat", "dog", "fish")
    assert [row for row, problem in enumerate(problems(manifest)) if problem] == [4, 19]
    assert problems(manifest)[4] == Problem.LABEL
    assert manifests.read(init(tmp_path / "b", tmp_path / "shards").data.path).class_names == ("0", "1", "2")


def test_array_records_of_texts_are_tokenized(tmp_path):
    records = text_records(700)
    records[3]["long_caption"] = " "
    records[4]["short_caption"] = ""
    records[5]["long_caption"] = "a \ud800 dog"
    records[6]["latent"] = np.zeros_like(records[6]["latent"])
    (tmp_path / "shards").mkdir()
    write_array_record(tmp_path / "shards/a.array_record", records)
    write_array_record(tmp_path / "shards/b.array_record", text_records(5))
    manifest = adopted(tmp_path, tmp_path / "shards")
    assert manifest.adopted == manifests.Adoption(form="texts", shard_rows=(700, 5))
    store = Store(manifest)
    assert sorted(set(range(705)) - set(store.valid_rows().tolist())) == [3, 4, 6]
    assert [problems(manifest)[row] for row in (3, 4, 6)] == [Problem.NO_TEXT] * 2 + [Problem.CONSTANT]
    rows = np.array([0, 5, 100, 699])
    for prefix, name in (("", "long_caption"), ("short_", "short_caption")):
        texts = [records[row][name].replace("\ud800", "?") for row in rows]
        ids, mask = Tokenizer(load_tokenizer("minilm"), max_tokens=9).tokenize(texts)
        assert (store.read(f"{prefix}token_ids", rows) == ids).all()
        assert (store.read(f"{prefix}token_mask", rows) == mask).all()
        assert [caption.read_part(manifest.data.path, 0)[f"{prefix}caption"][int(row)].as_py() for row in rows] == texts
    expected = torch.stack([torch.from_numpy(records[row]["latent"]).view(torch.bfloat16) for row in rows])
    assert np.abs(store.read("latents", rows) - expected.float().numpy()).max() <= 3e-8


def test_array_records_of_labels(tmp_path):
    write_array_record(tmp_path / "a.array_record", label_records(10))
    manifest = adopted(tmp_path, tmp_path / "a.array_record")
    assert manifest.class_names == ("0", "1", "2")
    assert Store(manifest).read("label", np.arange(10)).tolist() == [row % 3 for row in range(10)]
    assert Store(manifest).valid_rows().tolist() == list(range(10))


def test_the_vocabulary_is_that_of_the_text_encoder(tmp_path):
    """Ids beyond the vocabulary of MiniLM are valid with the encoder whose tokenizer made them."""
    encoder = make_t5gemma(tmp_path / "t5gemma", 40_000)
    source = write_torch_shards(tmp_path / "shards", "tokens", [200], vocabulary=40_000)
    ids = torch_entries("tokens", 200, vocabulary=40_000)["text_tokens"].numpy()
    within = (ids < 30_522).all(1)
    assert 0 < within.sum() < 200
    manifest = adopted(tmp_path, source, text_encoder=str(encoder))
    assert manifest.text_dim == 16
    assert Store(manifest).valid_rows().tolist() == list(range(200))
    text = caption.read_part(manifest.data.path, 0)["caption"][0].as_py()
    assert text.split() == [f"word{token}" for token in ids[0] if token]
    by_minilm = adopted(tmp_path / "other", source)
    assert Store(by_minilm).valid_rows().tolist() == np.flatnonzero(within).tolist()


@pytest.mark.parametrize(
    ("name", "valid", "form"),
    [
        ("stage1_shard_000000.pt", 48, "labels"),
        ("captions_shard_000000.pt", 48, "captions"),
        ("tokens_shard_000000.pt", 36, "tokens"),
        ("cc.array_record", 0, "texts"),  # its latents are random bits
        ("in1k.array_record", 0, "labels"),
    ],
)
def test_files_that_the_training_code_wrote(shared_data, tmp_path, name, valid, form):
    manifest = adopted(tmp_path, shared_data / "adopt" / name, vae=str(shared_data / "tiny-vae"))
    assert manifest.adopted is not None
    assert manifest.adopted.form == form
    assert manifest.latent_shape == (16, 32, 32)
    assert manifest.data.image_size == 256
    assert Store(manifest).valid_rows().tolist() == list(range(valid))
    if name == "tokens_shard_000000.pt":
        assert problems(manifest)[36:] == [Problem.CONSTANT] * 9 + [Problem.NOT_FINITE] * 3


def test_a_shard_that_is_done_is_not_adopted_again_and_an_altered_one_is(tmp_path):
    source = write_torch_shards(tmp_path / "shards", "tokens", [30, 20])
    recipe = init(tmp_path, source)
    dataset = Path(recipe.data.path)
    adopt.run(str(dataset), [1, 0])
    before = files(dataset)
    entry = ledger.path(dataset, "latents", 1).read_bytes()
    adopt.run(str(dataset), [0, 1])
    assert ledger.path(dataset, "latents", 1).read_bytes() == entry
    (tmp_path / "config.json").write_text(to_json(recipe))
    assert verify.run(str(tmp_path)) == {"caption": [], "latents": []}
    altered = dataset / "latents.zarr/token_ids/c/1/0"
    content = bytearray(altered.read_bytes())
    content[10] ^= 1
    altered.write_bytes(content)
    (dataset / "captions/00000.parquet").write_bytes(b"")
    assert verify.run(str(tmp_path)) == {"caption": [0], "latents": [1]}
    adopt.run(str(dataset), [0, 1])
    assert files(dataset) == before
    assert verify.run(str(tmp_path)) == {"caption": [], "latents": []}


@pytest.mark.slow
def test_a_killed_job_that_runs_again_leaves_the_same_bytes(tmp_path):
    """Kill the process at several moments of the second shard, and compare with an uninterrupted job."""
    source = write_torch_shards(tmp_path / "shards", "tokens", [600, 4000])
    uninterrupted = adopted(tmp_path / "whole", source)
    expected = files(Path(uninterrupted.data.path))
    dataset = init(tmp_path, source).data.path
    code = f"from jobs.tasks import adopt; adopt.run({dataset!r}, [0, 1])"
    for pause in (0.0, 0.01, 0.05, 0.2):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[3])
        deadline = time.monotonic() + 120
        while not list(Path(dataset).glob("latents.zarr/latents/c/1/0/0/.*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if pause == 0.0:
            assert 1 not in ledger.shards(dataset, "latents")
            assert max(Store(manifests.read(dataset)).valid_rows(), default=0) < 4000
    adopt.run(dataset, [0, 1])
    assert files(Path(dataset)) == {**expected, "manifest.json": (Path(dataset) / "manifest.json").read_bytes()}


def test_a_source_that_has_changed_is_refused(tmp_path):
    source = write_torch_shards(tmp_path / "shards", "labels", [30, 20])
    dataset = init(tmp_path, source).data.path
    adopt.run(dataset, [0])
    torch.save(torch_entries("labels", 20, seed=9), source / "shard_000001.pt")
    with pytest.raises(ValueError, match=r"shard_000001\.pt: has changed since the dataset .* was created"):
        adopt.run(dataset, [0, 1])
    (source / "shard_000001.pt").unlink()
    with pytest.raises(ValueError, match="has 1 shards, and other ones than the 2"):
        adopt.run(dataset, [1])
    assert ledger.shards(dataset, "latents") == {0}


@pytest.mark.parametrize("job", [caption, latents])
def test_jobs_that_need_images_are_refused(tmp_path, job):
    source = write_torch_shards(tmp_path / "shards", "labels", [30])
    manifest = adopted(tmp_path, source)
    ledger.path(manifest.data.path, "latents", 0).unlink()
    ledger.path(manifest.data.path, "caption", 0).unlink() if job is caption else None
    with pytest.raises(ValueError, match="was adopted"):
        job.run(manifest.data.path, [0])


@pytest.mark.parametrize("form", ["labels", "captions"])
def test_the_audit_has_captions_and_no_images(tmp_path, form):
    source = write_torch_shards(tmp_path / "shards", form, [30, 20])
    recipe = init(tmp_path, source)
    adopt.run(recipe.data.path, [0, 1])
    (tmp_path / "config.json").write_text(to_json(recipe))
    html = Path(audit.run(str(tmp_path))).read_text()
    assert f"adopted from {source} ({form})" in html
    assert "<img" not in html
    assert "words per caption" in html
    assert "brightness" not in html
    assert ("shard_000001.pt:" in html) == (form == "captions") or form == "labels"
    audit.require(recipe.data.path)
