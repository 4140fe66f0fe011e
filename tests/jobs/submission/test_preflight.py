"""Checks before a training job is submitted."""

import dataclasses
import json

import pytest

from jobs.submission.preflight import (
    check_bucket_rows,
    check_configuration,
    check_dataset,
    check_pipeline,
    check_resumed_shapes,
)
from pixart.config.keys import overrides
from pixart.recipes import demo

MANIFEST = {
    "class_names": ["circle", "square"],
    "images": 1000,
    "latent_shape": [16, 8, 8],
    "text_dim": 384,
    "data": dataclasses.asdict(demo("").data),
    "models": {"vae": "aa", "text_encoder": "bb", "captioner": "cc"},
}
CONFIG = {"in_dim": 16, "dim": 32, "text_dim": 384}


def record(**changes):
    """Return the metadata of a checkpoint that fits the dataset, with changes."""
    provenance = {"models": {"vae": "aa", "text_encoder": "bb"}}
    normalization = {"mean": [0.0] * 16, "std": [1.0] * 16, "pixel_range": [-1, 1]}
    values = {"config": CONFIG, "provenance": provenance, "plan": None, "dataset": None, "normalization": normalization}
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"provenance": {"models": {"vae": "zz"}}},
            r"another VAE \(fingerprint zz\) than that of .* aa\)",
        ),
        (
            {"provenance": {"models": {"vae": "aa", "text_encoder": "zz"}}},
            r"another text encoder \(fingerprint zz\)",
        ),
        ({"config": {**CONFIG, "in_dim": 4}}, "reads 4 latent channels, the dataset has 16"),
        ({"config": {**CONFIG, "text_dim": 2048}}, "width 2048, the dataset's have width 384"),
    ],
)
def test_a_dataset_that_does_not_fit_the_checkpoint(changes, message):
    check_dataset(demo(""), 2, MANIFEST, record())
    check_dataset(demo(""), 2, MANIFEST, record(provenance={}))  # a checkpoint without fingerprints
    with pytest.raises(ValueError, match=message) as error:
        check_dataset(demo(""), 2, MANIFEST, record(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("recipe", "backend"), [("mxfp8", "native"), ("delayed", "torchao"), ("rowwise", "te")])
def test_a_backend_that_does_not_implement_the_fp8_recipe(recipe, backend):
    def with_backend(name):
        stage2 = dataclasses.replace(demo("").stage2, fp8_backend=name)
        return dataclasses.replace(demo(""), stage2=stage2)

    check_configuration(with_backend("native"), 2, 1, record(plan={"recipe": "delayed"}), gpus=False)
    with pytest.raises(ValueError, match=f"fp8_backend={backend}.*{recipe}"):
        check_configuration(with_backend(backend), 2, 1, record(plan={"recipe": recipe}), gpus=True)


def test_backend_that_needs_gpus_is_refused_without_gpus():
    mxfp8 = record(plan={"recipe": "mxfp8"})
    check_configuration(demo(""), 2, 1, mxfp8, gpus=True)
    with pytest.raises(ValueError, match="TransformerEngine needs GPUs"):
        check_configuration(demo(""), 2, 1, mxfp8, gpus=False)


def test_a_pipeline_converts_by_the_recipe_of_stage_2():
    recipe = overrides.apply(demo(""), ["stage2.fp8_recipe=mxfp8"])
    check_pipeline(recipe, 1, gpus=True)
    with pytest.raises(ValueError, match="TransformerEngine needs GPUs"):
        check_pipeline(recipe, 1, gpus=False)
    check_pipeline(overrides.apply(recipe, ["stage2.fp8=false"]), 1, gpus=False)
    with pytest.raises(ValueError, match=r"^fp8_backend=native: .*mxfp8"):
        check_pipeline(overrides.apply(recipe, ["stage2.fp8_backend=native"]), 1, gpus=True)


def test_too_many_classes():
    many = {**MANIFEST, "class_names": list("abcde")}
    with pytest.raises(ValueError, match=r"--set model\.num_classes=6"):
        check_dataset(demo(""), 1, many, None)
    check_dataset(demo(""), 1, many, record())  # the checkpoint's number of classes applies


CONTENTS = {"items": 9, "labelled": 9, "left_out": {}, "largest_label": 2, "has_words": True, "columns": {}}


@pytest.mark.parametrize(
    ("stage", "changes", "start", "message"),
    [
        (1, {"largest_label": 5000}, None, r"^model\.num_classes=\d+: the largest label .* is 5000.*num_classes=5002"),
        (1, {"largest_label": 9}, record(config={**CONFIG, "num_classes": 10}), "start from another checkpoint"),
        (2, {"has_words": False}, record(), "no item of the source demo has words, and stage 2 needs captions"),
    ],
)
def test_a_source_that_does_not_fit_the_stage(tmp_path, stage, changes, start, message):
    recipe = demo(str(tmp_path))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, path=f"{tmp_path}"))
    (tmp_path / "source.json").write_text(json.dumps(CONTENTS))
    check_dataset(recipe, stage, MANIFEST, start)
    (tmp_path / "source.json").write_text(json.dumps({**CONTENTS, **changes}))
    with pytest.raises(ValueError, match=message):
        check_dataset(recipe, stage, MANIFEST, start)


@pytest.mark.parametrize("stored", [None, {**record()["config"], "patch_size": 4}])
def test_a_patch_that_does_not_divide_a_bucket(stored):
    buckets = {**MANIFEST, "buckets": [[4, 16], [8, 8], [6, 10]]}
    recipe = overrides.apply(demo(""), ["model.patch_size=4"])
    check_dataset(recipe, 2, {**MANIFEST, "buckets": [[4, 16], [8, 8]]}, record(config=stored) if stored else None)
    with pytest.raises(ValueError, match=r"^model\.patch_size=4: does not divide the dataset's latents of 6 x 10$"):
        check_dataset(recipe, 2, buckets, record(config=stored) if stored else None)


def test_a_run_is_not_resumed_on_other_buckets(tmp_path):
    recipe = overrides.apply(demo(""), ["data.aspect_buckets=64x64,128x32"])
    shapes = {"image_shapes": [[32, 128], [64, 64]]}
    check_resumed_shapes(recipe, tmp_path, record(provenance=shapes))
    check_resumed_shapes(recipe, tmp_path, record(provenance={}))  # of a checkpoint from before aspect buckets
    with pytest.raises(ValueError, match=r"^data\.aspect_buckets: .* of 128x32, 64x64, .* of 64x64; ") as error:
        check_resumed_shapes(demo(""), tmp_path, record(provenance=shapes))
    assert "\n" not in str(error.value)


def test_more_ranks_than_a_bucket_has_images(tmp_path):
    """They are known from the audit; a bucket without images is not trained on."""
    check_bucket_rows(str(tmp_path), 8)
    shapes = [{"width": 64, "height": 64, "images": images} for images in (9, 0, 3)]
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/audit.json").write_text(json.dumps({"shapes": shapes}))
    check_bucket_rows(str(tmp_path), 3)
    with pytest.raises(ValueError, match="its aspect bucket 64x64 has 3 images for 4 ranks"):
        check_bucket_rows(str(tmp_path), 4)
