import itertools
import re

import pytest

from pixart.config.keys import overrides
from pixart.config.renamed_keys import STAGE
from pixart.recipes import RECIPES

DEMO = RECIPES["demo"]("home")


def test_values_of_every_type():
    changed = overrides.apply(
        DEMO,
        [
            "stage1.steps=7",
            "data.max_images=none",
            "data.store_text_embeddings=False",
            "stage2.lr=3e-4",
            "data.captioner=vllm",
        ],
    )
    assert (changed.stage1.steps, changed.data.max_images, changed.data.store_text_embeddings) == (7, None, False)
    assert (changed.stage2.lr, changed.data.captioner) == (3e-4, "vllm")
    assert overrides.apply(DEMO, ["data.screening.min_side=32"]).data.screening.min_side == 32
    assert overrides.apply(DEMO, ["data.max_images=12"]).data.max_images == 12
    assert overrides.apply(DEMO, ["data.source=s3://bucket/a=b"]).data.source == "s3://bucket/a=b"


def test_other_values_stay():
    assert overrides.apply(DEMO, []) == DEMO
    changed = overrides.apply(DEMO, ["data.screening.min_side=32"])
    assert changed != DEMO
    assert overrides.apply(changed, ["data.screening.min_side=64"]) == DEMO


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e3", 1000), ("1E3", 1000), ("1.5e3", 1500), ("2.0", 2), ("4_000", 4000), ("9007199254740993", 2**53 + 1)],
)
def test_integers_in_any_notation(text, number):
    for key in ("steps", "num_validation_samples"):
        value = getattr(overrides.apply(DEMO, [f"stage1.{key}={text}"]).stage1, key)
        assert value == number
        assert type(value) is int


def test_last_of_two_values_wins():
    assert overrides.apply(DEMO, ["stage1.steps=0", "stage1.steps=9"]).stage1.steps == 9


@pytest.mark.parametrize(
    "assignments",
    [
        ["stage1.validate_every=0", "stage1.num_validation_samples=0"],
        ["stage2.num_validation_samples=9", "stage2.validate_every=7", "stage1.steps=3", "data.screening.min_side=8"],
    ],
)
def test_the_order_of_assignments_does_not_matter(assignments):
    results = [overrides.apply(DEMO, permutation) for permutation in itertools.permutations(assignments)]
    assert all(result == results[0] for result in results)
    assert results[0] != DEMO


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stage1.stepz=7", r"^stage1\.stepz: unknown key; did you mean stage1\.steps\?"),
        ("stage.lr=7", r"^stage\.lr: unknown key; did you mean stage1\.lr or stage2\.lr\?"),
        ("lr=7", r"^lr: unknown key; did you mean stage1\.lr or stage2\.lr\?"),
        ("data.min_side=7", r"did you mean data\.screening\.min_side\?"),
        ("stage1.batchsize=7", r"did you mean stage1\.global_batch_size\?"),
        ("stage1.batch=7", r"did you mean stage1\.global_batch_size\?"),
        ("sampel.steps=7", r"did you mean stage1\.steps or stage2\.steps or sample\.steps\?"),
        ("sampel.step=7", r"did you mean sample\.steps\?"),
        ("stage2.zzz=7", r"^stage2\.zzz: unknown key; it must be one of stage2\.steps, stage2\.global_batch_size"),
        ("nothing=1", r"^nothing: unknown key; it must be one of data\.\*, audit\.\*, model\.\*"),
        ("name=mine", "^name: unknown key"),
        (
            "data.screening.blur=7",
            r"^data\.screening\.blur: unknown key; it must be one of data\.screening\.max_pixels",
        ),
        ("stage1.lr.x=7", r"^stage1\.lr\.x: unknown key"),
        ("stage1=7", r"^stage1: is a section, not a key; set one of stage1\.steps"),
        ("data.screening=7", r"is a section, not a key; set one of data\.screening\.max_pixels"),
        ("stage1.steps", "^stage1.steps: has no value; write stage1.steps=VALUE, where VALUE is a whole number"),
        ("=7", "^'=7': has no key; write KEY=VALUE"),
        ("stage1.steps=many", "^stage1.steps='many': must be a whole number"),
        ("stage1.steps=1.5", "must be a whole number"),
        ("stage1.steps=inf", "must be a whole number"),
        ("stage1.steps=nan", "must be a whole number"),
        ("stage1.steps=1e30", r"must be less than 2\*\*63"),
        ("stage1.lr=fast", "^stage1.lr='fast': must be a number"),
        ("data.max_images=all", "^data.max_images='all': must be a whole number or none"),
        ("stage2.fp8=yes", "^stage2.fp8='yes': must be true or false"),
        ("stage1.precision=fp16", "^stage1.precision='fp16': must be bf16 or fp32"),
        ("stage1.steps=0", "^stage1.steps=0: must be at least 1"),
        ("stage2.global_batch_size=-4", "^stage2.global_batch_size=-4: must be at least 1"),
        ("stage1.lr=nan", "^stage1.lr=nan: must be at least 0"),
        ("stage1.max_grad_norm=0", "^stage1.max_grad_norm=0.0: must be more than 0"),
        ("stage1.beta2=1", "^stage1.beta2=1.0: must be less than 1"),
        ("stage1.cond_dropout_prob=1.5", r"^stage1.cond_dropout_prob=1.5: must lie between 0 and 1"),
        ("stage1.num_validation_samples=0", "^stage1.validate_every=100: num_validation_samples is 0; it must be"),
        ("data.max_images=0", "^data.max_images=0: must be at least 1"),
        ("data.num_shards=1e7", "^data.num_shards=10000000: must be at most 1000000"),
        ("data.screening.min_side=0", "^data.screening.min_side=0: must be at least 1"),
        ("data.screening.max_aspect=nan", "^data.screening.max_aspect=nan: must be at least 1"),
        (
            "data.screening.solid_color_fraction=0",
            r"^data\.screening\.solid_color_fraction=0\.0: must be more than 0 and",
        ),
        ("data.screening.uniform_area_fraction=1.1", "fraction=1.1: must be more than 0 and at most 1"),
        ("sample.count=0", "^sample.count=0: must be at least 1"),
    ],
)
def test_errors_name_the_key_and_allowed_values(assignment, message):
    with pytest.raises(ValueError, match=message) as caught:
        overrides.apply(DEMO, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", STAGE)
def test_keys_of_version_0_1_are_refused(key):
    with pytest.raises(ValueError, match=re.escape(f"stage1.{key}: unknown key; ")):
        overrides.apply(DEMO, [f"stage1.{key}=1"])


@pytest.mark.parametrize("text", ["0,1", "[0, 1]", " 0, 1"])
def test_a_pair_is_written_with_or_without_brackets(text):
    assert overrides.apply(RECIPES["demo"]("home"), [f"data.pixel_range={text}"]).data.pixel_range == (0, 1)


def test_a_pixel_range_that_no_autoencoder_has_is_refused():
    with pytest.raises(ValueError, match=r"^data\.pixel_range=\(0, 2\): must be -1,1 or 0,1"):
        overrides.apply(RECIPES["demo"]("home"), ["data.pixel_range=0,2"])
