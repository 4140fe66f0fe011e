import pytest

from pixart.config.overrides import override
from pixart.config.recipe import from_json, to_json
from pixart.recipes import RECIPES

DEMO = RECIPES["demo"]("home")


def test_overrides_by_dotted_key():
    changed = override(
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
    assert override(DEMO, ["data.screening.min_side=32"]).data.screening.min_side == 32
    assert override(DEMO, ["data.max_images=12"]).data.max_images == 12
    assert override(DEMO, ["data.source=s3://bucket/a=b"]).data.source == "s3://bucket/a=b"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stage1.stepz=7", r"'stage1.stepz'.*steps, global_batch_size"),
        ("nothing=1", "'nothing'.*data, audit, model"),
        ("stage1=7", "is a group; set one of stage1.steps"),
        ("name.x=7", "has no parts"),
        ("stage1.steps", "write it as key=value"),
        ("stage1.steps=many", "stage1.steps='many': must be of type int"),
        ("stage1.steps=1.5", "must be of type int"),
        ("stage2.fp8=yes", "must be true or false"),
        ("stage1.precision=fp16", "must be one of bf16, fp32"),
        ("stage1.steps=0", "^stage1.steps=0: must be at least 1"),
        ("stage2.global_batch_size=-4", "^stage2.global_batch_size=-4: must be at least 1"),
        ("stage1.lr=nan", "^stage1.lr=nan: must be at least 0"),
        ("stage1.cond_dropout_prob=1.5", r"^stage1.cond_dropout_prob=1.5: must lie between 0 and 1"),
        ("data.max_images=0", "^data.max_images=0: must be at least 1"),
        ("data.screening=7", r"is a group; set one of data\.screening\.max_pixels"),
        ("data.screening.blur=7", "'data.screening.blur'.*max_pixels, min_side"),
        ("data.screening.max_pixels=1e6", "data.screening.max_pixels='1e6': must be of type int"),
        ("data.screening.min_side=0", "^data.screening.min_side=0: must be at least 1"),
        ("data.screening.max_aspect=nan", "^data.screening.max_aspect=nan: must be at least 1"),
        (
            "data.screening.solid_color_fraction=0",
            "^data.screening.solid_color_fraction=0.0: must be more than 0 and at most 1",
        ),
        (
            "data.screening.uniform_area_fraction=1.1",
            "^data.screening.uniform_area_fraction=1.1: must be more than 0 and at most 1",
        ),
        ("sample.count=0", "^sample.count=0: must be at least 1"),
    ],
)
def test_mistakes_name_the_key(assignment, message):
    with pytest.raises(ValueError, match=message) as caught:
        override(DEMO, [assignment])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = RECIPES[name]("home")
    assert from_json(to_json(recipe)) == recipe
    changed = override(recipe, ["data.screening.min_side=32"])
    assert from_json(to_json(changed)) == changed
