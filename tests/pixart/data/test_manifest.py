import dataclasses
import json

import pytest

from pixart.config.captions import CaptionsConfig, visible_attributes
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.captions.captioner import prompt_hash
from pixart.data.manifest import Manifest, model_fingerprint

OTHERS = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "max_tokens": 5}
TEXTS = {"image_instruction": "Say what is there.", "rewrite_instruction": "Say it again."}


@pytest.fixture
def manifest(tmp_path):
    models = {"vae": "aa", "text_encoder": "bb", "captioner": "cc"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (4, 8, 8), "text_dim": 9}
    return Manifest(data=DataConfig(path=str(tmp_path / "data")), class_names=(), models=models, **sizes)


def with_captions(manifest, **changes):
    captions = dataclasses.replace(manifest.data.captions, **changes)
    return dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, captions=captions))


@pytest.mark.parametrize("field", dataclasses.fields(CaptionsConfig), ids=lambda field: field.name)
def test_the_hash_covers_the_captions(manifest, field):
    changed = with_captions(manifest, **{field.name: {**OTHERS, **TEXTS}[field.name]})
    assert changed.hash != manifest.hash


def test_the_dataset_keeps_its_instructions_and_sampling(manifest):
    manifest = with_captions(manifest, **dataclasses.asdict(visible_attributes()))
    manifests.write(manifest)
    assert manifests.read(manifest.data.path) == manifest
    record = json.loads((manifests.Path(manifest.data.path) / manifests.FILE).read_text())
    assert record["data"]["captions"]["rewrite_instruction"] == visible_attributes().rewrite_instruction
    record["data"]["captions"]["temperature"] = 0.1
    (manifests.Path(manifest.data.path) / manifests.FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was edited after the dataset was created"):
        manifests.read(manifest.data.path)


@pytest.mark.parametrize("version", [2, 3])
def test_earlier_formats_mean_the_default_captions(manifest, version):
    old = dataclasses.replace(manifest, format=version)
    assert "captions" not in old.values()["data"]
    assert with_captions(old, temperature=1.0).hash == old.hash  # a key that the format does not have
    manifests.write(old)
    assert manifests.read(old.data.path) == old
    assert manifests.read(old.data.path).data.captions == CaptionsConfig()


def test_the_fingerprint_of_a_captioner_ends_with_the_hash_of_its_instruction(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    data = DataConfig(path="data", captioner="vllm", caption_model=str(tmp_path / "model"))
    default = model_fingerprint(data, "captioner")
    assert default.endswith(f"-{prompt_hash(CaptionsConfig().image_instruction)}")
    preset = model_fingerprint(dataclasses.replace(data, captions=visible_attributes()), "captioner")
    assert preset.endswith(f"-{prompt_hash(visible_attributes().image_instruction)}")
    assert preset.partition("-")[0] == default.partition("-")[0]
    assert preset != default
