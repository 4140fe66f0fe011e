import dataclasses

import pytest

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.encoders import fingerprint as fingerprints


@pytest.fixture(autouse=True)
def _fresh():
    fingerprints.fingerprint.cache_clear()


def folder(path, weights: bytes, config: str = "{}"):
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "README.md").write_text(str(path))  # is no part of the model
    return str(path)


def test_a_folder_is_its_files_wherever_it_lies(tmp_path):
    same, copy = folder(tmp_path / "a", b"12345"), folder(tmp_path / "b", b"12345")
    others = [folder(tmp_path / "c", b"12346"), folder(tmp_path / "d", b"12345", "[]")]
    assert fingerprints.fingerprint(same) == fingerprints.fingerprint(copy)
    assert len({fingerprints.fingerprint(name) for name in [same, *others]}) == 3


def test_of_large_files_parts_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE", 1000)
    monkeypatch.setattr(fingerprints, "SAMPLE", 10)
    ends = [bytes([1]) + bytes(4998) + bytes([last]) for last in (0, 1)]
    names = [folder(tmp_path / str(index), weights) for index, weights in enumerate([*ends, ends[1] + b"0"])]
    assert len({fingerprints.fingerprint(name) for name in names}) == 3


def test_what_is_no_model_is_an_error():
    with pytest.raises(ValueError, match="neither a model folder nor"):
        fingerprints.fingerprint("/no/such/folder")


def test_another_model_under_the_same_name_is_refused(tmp_path):
    name = folder(tmp_path / "vae", b"weights", '{"latent_channels": 4, "block_out_channels": [8, 8]}')
    data = DataConfig(path=str(tmp_path / "data"), max_images=4, image_size=64, vae=name)
    manifest = manifests.make(data)
    manifests.check_model(manifest, "vae")
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"trained on")
    fingerprints.fingerprint.cache_clear()
    with pytest.raises(ValueError, match=r"its vae is no longer the one that it was made with"):
        manifests.check_model(manifest, "vae")
    assert dataclasses.replace(manifest, models={}).hash != manifest.hash


def test_a_manifest_that_was_changed_is_refused(tmp_path):
    manifest = manifests.make(DataConfig(path=str(tmp_path / "data"), max_images=4, image_size=64, num_shards=2))
    manifests.write(manifest)
    file = tmp_path / "data" / manifests.FILE
    file.write_text(file.read_text().replace('"rows_per_shard": 2', '"rows_per_shard": 3'))
    with pytest.raises(ValueError, match="was changed since the dataset was made"):
        manifests.read(tmp_path / "data")
    file.write_text('{"format": 2}')
    with pytest.raises(ValueError, match="is no manifest"):
        manifests.read(tmp_path / "data")
