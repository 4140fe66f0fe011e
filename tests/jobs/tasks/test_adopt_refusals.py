"""Shards that cannot be adopted, contradicted settings and malicious pickles: one line, and nothing written."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from jobs.state import ledger
from jobs.tasks import adopt
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from tests.support import precomputed
from tests.support.adoption import init, make_recipe
from tests.support.precomputed import (
    WIDTH,
    label_records,
    random_latents,
    record,
    text_records,
    torch_entries,
    write_array_record,
    write_torch_shards,
)


def save(path: Path, entries: dict) -> None:
    torch.save(entries, path / "shard_000001.pt")


def other_shape(folder: Path) -> None:
    save(folder, {**torch_entries("tokens", 20), "latents": random_latents(20, shape=(16, 4, 4))})


def other_width(folder: Path) -> None:
    ids, mask = precomputed.random_tokens(20, 30_000, width=7)
    save(folder, {**torch_entries("tokens", 20), "text_tokens": ids, "attn_mask": mask})


def other_form(folder: Path) -> None:
    save(folder, torch_entries("labels", 20))


def other_length(folder: Path) -> None:
    save(folder, {**torch_entries("tokens", 20), "attn_mask": torch.ones(19, WIDTH, dtype=torch.int8)})


def other_type(folder: Path) -> None:
    save(folder, {**torch_entries("tokens", 20), "latents": random_latents(20).float()})


def missing_key(folder: Path) -> None:
    entries = torch_entries("tokens", 20)
    del entries["attn_mask"]
    save(folder, entries)


def no_dict(folder: Path) -> None:
    torch.save([random_latents(3)], folder / "shard_000001.pt")


def no_rows(folder: Path) -> None:
    save(folder, {name: value[:0] for name, value in torch_entries("tokens", 2).items()})


def expanded(folder: Path) -> None:
    save(folder, {**torch_entries("tokens", 20), "latents": random_latents(1).expand(20, -1, -1, -1)})


def truncated(folder: Path) -> None:
    path = folder / "shard_000001.pt"
    path.write_bytes(path.read_bytes()[:-1000])


def empty(folder: Path) -> None:
    (folder / "shard_000001.pt").write_bytes(b"")


def compressed(folder: Path) -> None:
    path = folder / "shard_000001.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran",)


def malicious(folder: Path) -> None:
    torch.save({**torch_entries("tokens", 20), "latents": Malicious()}, folder / "shard_000001.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_shape, r"holds tokens with latents of shape \(16, 4, 4\)"),
        (other_width, "captions of 7 tokens, and shard_000000.pt tokens"),
        (other_form, "holds labels with latents"),
        (other_length, r"attn_mask is int8 of shape \(19, 12\); with 20 latents it must be int8 of shape \(20, 12\)"),
        (other_type, "latents are float32"),
        (missing_key, "has the entries latents, text_tokens; the forms are"),
        (no_dict, "holds no dict of named tensors"),
        (no_rows, "latents are bfloat16 of shape"),
        (expanded, "latents is not a contiguous tensor|is larger than its data"),
        (truncated, "truncated"),
        (empty, "truncated"),
        (compressed, "compressed"),
        (malicious, "it is not a file of tensors alone"),
    ],
)
def test_shards_that_cannot_be_adopted_are_refused_with_nothing_written(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    source = write_torch_shards(tmp_path / "shards", "tokens", [30, 20])
    change(source)
    with pytest.raises(ValueError, match=message) as caught:
        init(tmp_path, source)
    assert "\n" not in str(caught.value)
    assert "shard_000001.pt" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def odd_record(index: int, item) -> list:
    records = text_records(12)
    records[index] = item
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (odd_record(7, Malicious()), "record 7: is not a pickled record: the name posix.system"),
        (
            odd_record(0, {"latent": Malicious(), "label": 1}),
            "record 0: is not a pickled record: the name posix.system",
        ),
        (odd_record(7, b"hello"), "record 7: is not a pickled record"),
        (odd_record(7, label_records(1)[0]), "record 7 has label, latent, unlike record 0"),
        (odd_record(7, {**text_records(1)[0], "long_caption": 3}), "record 7: a caption is no text"),
        (
            odd_record(7, record(random_latents(1)[0, :8], short_caption="a", long_caption="b")),
            "record 7: the latent is",
        ),
        ([record(random_latents(1)[0], label=10**20)], "record 0: the label is no integer"),
        ([{"latent": 3, "label": 1}], "record 0: the latent is no array"),
        ([{"latents": 3}], "its records have latents; the forms are"),
    ],
)
def test_records_that_cannot_be_adopted_are_refused_with_nothing_written(tmp_path, monkeypatch, records, message):
    monkeypatch.chdir(tmp_path)
    path = write_array_record(tmp_path / "a.array_record", records)
    with pytest.raises(ValueError, match=message) as caught:
        init(tmp_path, path)
    assert "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["a.array_record"]


def test_a_record_between_the_checked_ones_is_refused_by_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = text_records(1000)
    records[998] = Malicious()
    dataset = init(tmp_path, write_array_record(tmp_path / "a.array_record", records)).data.path
    with pytest.raises(ValueError, match="record 998: is not a pickled record"):
        adopt.run(dataset, [0])
    assert not (tmp_path / "ran").exists()
    assert not ledger.shards(dataset, "latents")
    assert not Store(manifests.read(dataset)).valid_rows().size


@pytest.mark.parametrize("content", [b"", b"x" * 1000, None])
def test_damaged_array_records_are_refused(tmp_path, content):
    path = write_array_record(tmp_path / "a.array_record", text_records(50))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    with pytest.raises(ValueError, match="it is not an ArrayRecord file with records, or it is truncated"):
        init(tmp_path, path)


def test_without_the_package_the_error_names_its_installation(tmp_path, monkeypatch):
    path = write_array_record(tmp_path / "a.array_record", text_records(5))
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    with pytest.raises(ValueError, match=r"pip install 'pixart-suite\[array-record\]'"):
        init(tmp_path, path)


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("labels", {"names": ("a", "b")}, "--class-names: the file has 2 names, and the shards have the label 4"),
        ("tokens", {"names": ("a", "b")}, "have no labels"),
        ("tokens", {"chosen": ("max_text_tokens",)}, "data.max_text_tokens=9: with these shards it is 12"),
        ("tokens", {"chosen": ("short_captions",), "short_captions": True}, "data.short_captions=True"),
        ("labels", {"chosen": ("image_size",), "image_size": 128}, "data.image_size=128: with these shards it is 64"),
        ("labels", {"vae": "/no/such/model"}, "neither a model folder"),
        ("labels", {"text_encoder": "/no/such/model"}, "neither a model folder"),
    ],
)
def test_settings_that_the_shards_contradict_are_refused_with_nothing_written(tmp_path, form, options, message):
    source = write_torch_shards(tmp_path / "shards", form, [30])
    with pytest.raises(ValueError, match=message):
        init(tmp_path, source, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_vae_of_other_channels_and_an_encoder_that_is_not_named_are_refused(tmp_path):
    source = tmp_path / "shards"
    source.mkdir()
    torch.save(
        {**torch_entries("labels", 5), "latents": random_latents(5, shape=(4, 8, 8))}, source / "shard_000000.pt"
    )
    with pytest.raises(ValueError, match=r"data\.vae=demo: has 16 latent channels, and the shards have 4"):
        init(tmp_path, source)
    torch.save(torch_entries("tokens", 5), source / "shard_000000.pt")
    with pytest.raises(ValueError, match="name the text encoder whose tokenizer made them"):
        adopt.init(to_json(make_recipe(tmp_path, source)), [], ["vae"])


def test_a_pickle_of_protocol_5_is_refused_by_name(tmp_path):
    path = write_array_record(tmp_path / "a.array_record", [pickle.dumps(text_records(1)[0], protocol=5)])
    with pytest.raises(
        ValueError, match=r"record 0: is not a pickled record: the name numpy\._core\.numeric\._frombuffer"
    ):
        init(tmp_path, path)
