import dataclasses

import pytest

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.encoders import fingerprint as fingerprints


@pytest.fixture(autouse=True)
def _fresh():
    fingerprints.fingerprint.cache_clear()


def make_model_folder(path, weights: bytes, config: str = "{}"):
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(weights)
    (path / "README.md").write_text(str(path))  # not part of the model
    return str(path)


def test_fingerprint_depends_on_the_files_of_a_folder_only(tmp_path):
    same, copy = make_model_folder(tmp_path / "a", b"12345"), make_model_folder(tmp_path / "b", b"12345")
    others = [make_model_folder(tmp_path / "c", b"12346"), make_model_folder(tmp_path / "d", b"12345", "[]")]
    assert fingerprints.fingerprint(same) == fingerprints.fingerprint(copy)
    assert len({fingerprints.fingerprint(name) for name in [same, *others]}) == 3


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "MAX_FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(fingerprints, "SAMPLE_BYTES", 10)
    contents = [bytes([1]) + bytes(4998) + bytes([last]) for last in (0, 1)]
    names = [
        make_model_folder(tmp_path / str(index), weights)
        for index, weights in enumerate([*contents, contents[1] + b"0"])
    ]
    assert len({fingerprints.fingerprint(name) for name in names}) == 3


def test_missing_model_is_an_error():
    with pytest.raises(ValueError, match="neither a model folder nor"):
        fingerprints.fingerprint("/no/such/folder")


def test_check_model_refuses_another_model_of_the_same_name(tmp_path):
    name = make_model_folder(tmp_path / "vae", b"weights", '{"latent_channels": 4, "block_out_channels": [8, 8]}')
    data = DataConfig(path=str(tmp_path / "data"), max_images=4, image_size=64, vae=name)
    manifest = manifests.make(data)
    manifests.check_model(manifest, "vae")
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"trained on")
    fingerprints.fingerprint.cache_clear()
    with pytest.raises(ValueError, match=r"its vae has changed since the dataset was created"):
        manifests.check_model(manifest, "vae")
    assert dataclasses.replace(manifest, models={}).hash != manifest.hash


def test_edited_manifest_is_refused(tmp_path):
    manifest = manifests.make(DataConfig(path=str(tmp_path / "data"), max_images=4, image_size=64, num_shards=2))
    manifests.write(manifest)
    file = tmp_path / "data" / manifests.FILE
    file.write_text(file.read_text().replace('"rows_per_shard": 2', '"rows_per_shard": 3'))
    with pytest.raises(ValueError, match="was edited after the dataset was created"):
        manifests.read(tmp_path / "data")
    file.write_text('{"format": 2}')
    with pytest.raises(ValueError, match="is not a dataset manifest"):
        manifests.read(tmp_path / "data")
