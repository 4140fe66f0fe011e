"""Records of version 0.1, written by its code, are read exactly."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from jobs.state import ledger
from pixart.checkpoint.directory import load_without_tensors
from pixart.config import renamed_keys
from pixart.config.dataset import AuditConfig, DataConfig, ScreeningConfig
from pixart.config.model import ModelConfig
from pixart.config.recipe import from_json, to_json
from pixart.config.sampling import SampleConfig
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests

RECORDS = Path(__file__).parent / "version_0_1"
HASH = "f31585ada1a01015"  # of the manifest, as version 0.1 computed it
ADDED = {
    "decay_qk_norm",
    "fp8_recipe",
    "evaluate_every",
    "finish_bf16_steps",
    "time_shift",
}  # keys of a stage that version 0.1 did not have
TRAINING = TrainConfig(
    time_shift="1",
    steps=300,
    global_batch_size=64,
    lr=6e-3,
    warmup_steps=40,
    min_lr_ratio=0.05,
    ema_decay=0.99,
    precision="fp32",
    log_every=5,
    validate_every=100,
    num_validation_samples=64,
    preview_every=100,
)


def old_recipe():
    return json.loads((RECORDS / "config.json").read_text())


def test_the_configuration_of_a_run():
    recipe = from_json((RECORDS / "config.json").read_text())
    assert recipe.name == "demo"
    assert recipe.data == DataConfig(
        path="home/datasets/demo",
        num_shards=4,
        max_images=64,
        image_size=64,
        normalization="scalar",
        max_text_tokens=32,
        text_scale=1 / 0.35,
        store_text_embeddings=True,
        short_captions=True,
        screening=ScreeningConfig(min_side=32),
    )
    assert recipe.audit == AuditConfig(max_duplicates=1, max_same_opening=1)
    assert recipe.model == ModelConfig(
        dim=128, cond_dim=128, num_heads=4, num_blocks=4, base_latent_size=8, num_classes=5
    )
    assert recipe.stage1 == dataclasses.replace(TRAINING, attention_backend="default")
    assert recipe.stage2 == dataclasses.replace(
        TRAINING,
        steps=800,
        fp8=True,
        max_grad_norm=0.5,
        short_caption_prob=0.25,
        sharding="hsdp",
        shard_text_encoder=True,
    )
    assert recipe.sample == SampleConfig(guidance=2.0)
    assert from_json(to_json(recipe)) == recipe


def test_every_renamed_key_is_in_the_records_and_keeps_its_value():
    old, default = old_recipe(), TrainConfig(steps=1, global_batch_size=1, lr=1.0, warmup_steps=0)
    for stage in ("stage1", "stage2"):
        values = {**old[stage], **{key: _other(key, value) for key, value in old[stage].items()}}
        renamed = renamed_keys.rename_stage(values)
        assert set(renamed) == {field.name for field in dataclasses.fields(default)} - ADDED
        for key, name in renamed_keys.STAGE.items():
            expected = renamed_keys.STAGE_VALUES.get(name, {}).get(values[key], values[key])
            assert renamed[name] == expected, name
    assert set(renamed_keys.STAGE) <= set(old["stage1"])
    assert set(renamed_keys.DATA) <= set(old["data"])
    assert set(renamed_keys.SCREENING) <= set(old["data"]["screening"])
    assert set(renamed_keys.MODEL) <= set(old["model"])


def _other(key, value):
    """Return a distinct value for each key, so that mixed-up keys are detected."""
    return value if isinstance(value, str | bool) else hash(key) % 1000 + 1


def test_a_key_under_both_names_is_refused():
    with pytest.raises(TypeError, match="both batch and global_batch_size"):
        renamed_keys.rename_stage({"batch": 1, "global_batch_size": 2})
    for damaged in ([], None, "text"):
        with pytest.raises(TypeError, match="not an object"):
            renamed_keys.rename_data(damaged)


def test_the_manifest_of_a_dataset(tmp_path):
    shutil.copy(RECORDS / "manifest.json", tmp_path)
    manifest = manifests.read(tmp_path)
    assert manifest.hash == HASH == json.loads((RECORDS / "manifest.json").read_text())["hash"]
    recipe = from_json((RECORDS / "config.json").read_text())
    assert manifest.data == dataclasses.replace(recipe.data, path=str(tmp_path))
    raw = ledger.manifest(tmp_path)
    assert raw["hash"] == HASH
    assert (raw["data"]["num_shards"], raw["data"]["max_images"]) == (4, 64)
    assert raw["data"]["screening"]["solid_color_fraction"] == 0.999
    manifests.write(manifest)  # in its original format
    assert manifests.read(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["data"]["shards"] == 4


@pytest.mark.parametrize("key", ["shards", "images", "text_tokens", "image_size", "text_states"])
def test_a_changed_manifest_is_refused(tmp_path, key):
    record = json.loads((RECORDS / "manifest.json").read_text())
    record["data"][key] = record["data"][key] + 1
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was edited after the dataset was created"):
        manifests.read(tmp_path)


def test_current_manifest_is_read(tmp_path):
    shutil.copy(RECORDS / "manifest.json", tmp_path)
    old = manifests.read(tmp_path)
    manifest = dataclasses.replace(old, format=manifests.FORMAT)
    manifests.write(manifest)
    record = json.loads((tmp_path / "manifest.json").read_text())
    assert record["format"] == manifests.FORMAT == 4
    assert record["data"]["num_shards"] == 4
    assert manifests.read(tmp_path) == manifest
    assert record["hash"] == manifest.hash != old.hash
    record["format"] = 2  # its hash is of the keys of format 3
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was edited after the dataset was created"):
        manifests.read(tmp_path)
    record["format"] = 5
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="format 5; supported are 2, 3 and 4"):
        manifests.read(tmp_path)


def test_the_record_of_a_checkpoint(tmp_path):
    shutil.copy(RECORDS / "training.json", tmp_path)
    (tmp_path / "state").mkdir()
    checkpoint = load_without_tensors(tmp_path)
    assert checkpoint.provenance["dataset_hash"] == HASH
    sizes = ModelConfig(dim=16, cond_dim=16, num_heads=2, num_blocks=1, base_latent_size=8, num_classes=5)
    assert {**checkpoint.config, "text_dim": None} == {**sizes.dit_arguments(), "text_dim": None}
    assert checkpoint.config["base_image_size"] == 8
