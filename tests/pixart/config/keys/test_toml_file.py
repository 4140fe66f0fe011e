import tomllib

import pytest

from pixart.config.keys import overrides, reference, toml_file
from pixart.config.keys.toml_file import RunFile
from pixart.recipes import RECIPES

CHANGES = [
    "data.source=C:\\photos \"of\" 'cats' #1 = é",
    "data.max_images=none",
    "data.screening.min_side=99",
    "audit.max_plain=0.25",
    "stage1.lr=3e-07",
    "stage1.eps=0.0",
    "stage2.compile=true",
    "stage2.steps=9007199254740993",
]


def written(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


@pytest.mark.parametrize("meanings", [False, True])
@pytest.mark.parametrize("changes", [[], CHANGES])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_toml(tmp_path, name, changes, meanings):
    recipe = overrides.apply(RECIPES[name]("home"), changes)
    text = toml_file.dumps(recipe, meanings=meanings)
    loaded = toml_file.load(written(tmp_path, text))
    assert (loaded.recipe, loaded.dataset, loaded.cluster) == (name, None, None)
    assert overrides.apply(RECIPES[name]("elsewhere"), loaded.overrides) == recipe
    assert len(loaded.overrides) == len(reference.keys(recipe))
    values = tomllib.loads(text)
    assert values["data"]["screening"]["min_side"] == recipe.data.screening.min_side
    assert values["stage1"]["lr"] == recipe.stage1.lr
    assert text.count("# ") - str(changes).count("# ") == (len(reference.keys(recipe)) if meanings else 0)


def test_file_with_all_sections(tmp_path):
    path = written(
        tmp_path,
        """
        recipe = "xl"
        dataset = "s3://bucket/data"
        cluster = "hpg-b200"
        stage2.fp8 = false

        [stage1]
        steps = 1e3
        lr = 1

        [data]
        max_images = "none"
        [data.screening]
        min_side = 128
        """,
    )
    loaded = toml_file.load(path)
    assert loaded == RunFile(
        recipe="xl",
        dataset="s3://bucket/data",
        cluster="hpg-b200",
        overrides=(
            "stage2.fp8=false",
            "stage1.steps=1000.0",
            "stage1.lr=1",
            "data.max_images=none",
            "data.screening.min_side=128",
        ),
    )
    recipe = overrides.apply(RECIPES["xl"]("home"), [*loaded.overrides, "stage1.lr=0.5"])
    assert (recipe.stage1.steps, recipe.stage1.lr, recipe.stage2.fp8) == (1000, 0.5, False)
    assert (recipe.data.max_images, recipe.data.screening.min_side) == (None, 128)


def test_an_empty_file_changes_nothing(tmp_path):
    assert toml_file.load(written(tmp_path, "[stage1]\n")) == RunFile()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = 3", "recipe=3: must be a string"),
        ('recipes = "xl"', r"recipes: unknown key; did you mean recipe\?"),
        ('zzz = "xl"', "zzz: unknown key; it must be one of recipe, dataset, cluster, home or a section"),
        ("[stage3]\nlr = 1", r"stage3: unknown key; did you mean stage"),
        ("[stage1]\nstepz = 1", r"stage1\.stepz: unknown key; did you mean stage1\.steps\?"),
        ("[stage1]\nsteps = 1.5", r"stage1\.steps='1\.5': must be a whole number"),
        ('[stage1]\nsteps = "many"', r"stage1\.steps='many': must be a whole number"),
        ("[stage1]\nsteps = true", r"stage1\.steps='true': must be a whole number"),
        ("[stage1]\nfp8 = 1", r"stage1\.fp8='1': must be true or false"),
        ("[data]\nsource = ['a', 'b']", r"data\.source=\['a', 'b'\]: must be a string, a number or a boolean"),
        ("[data]\nsource = 2026-01-01", r"data\.source=.*: must be a string, a number or a boolean"),
        ("[data]\npixel_range = [0]", r"data\.pixel_range='0': must be 2 whole numbers, separated by commas"),
        ("[data]\nscreening = 1", r"data\.screening: is a section, not a key"),
        ("stage1 = 1", "stage1: is a section, not a key"),
        ("[stage1.lr]", r"stage1\.lr: is a key, not a section; write lr = VALUE in its section"),
        ("[data.screaning]", r"data\.screaning: unknown key"),
        ("recipe = ", "is not TOML; "),
        ("[stage1]\n[stage1]", "is not TOML; "),
    ],
)
def test_errors_name_the_file_and_the_key(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=rf"run\.toml: {message}") as caught:
        toml_file.load(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"run\.toml: cannot be read; No such file or directory"):
        toml_file.load(tmp_path / "run.toml")
    with pytest.raises(ValueError, match="cannot be read; Is a directory"):
        toml_file.load(tmp_path)
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"run\.toml: is not TOML; .*utf-8"):
        toml_file.load(tmp_path / "run.toml")
