import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.config import overrides
from pixart.config.recipe import from_json, to_json
from pixart.config.training import FP8_BACKENDS, resolve_fp8_backend
from pixart.recipes import RECIPES

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "numpy", "pydantic", "tomlkit", "diffusers", "transformers", "zarr", "pyarrow"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_json(name):
    recipe = RECIPES[name]("home")
    assert recipe.name == name
    assert from_json(to_json(recipe)) == recipe
    changed = overrides.apply(recipe, ["data.screening.min_side=32"])
    assert from_json(to_json(changed)) == changed


@pytest.mark.parametrize("section", ["data", "audit", "model", "stage1", "stage2", "sample"])
def test_a_record_with_another_key_is_refused(section):
    text = to_json(RECIPES["demo"]("home")).replace(f'"{section}": {{', f'"{section}": {{"blur": 1,')
    with pytest.raises(TypeError, match="blur"):
        from_json(text)


def test_the_stages_of_a_recipe_differ_in_length_and_precision_only():
    for make in RECIPES.values():
        recipe = make("home")
        assert dataclasses.replace(recipe.stage1, steps=recipe.stage2.steps, fp8=True) == recipe.stage2


@pytest.mark.parametrize("fp8_recipe", FP8_BACKENDS)
def test_the_default_backend_of_an_fp8_recipe(fp8_recipe):
    supported = FP8_BACKENDS[fp8_recipe]
    assert resolve_fp8_backend("auto", fp8_recipe) == supported[0]
    for backend in ("native", "torchao", "te"):
        if backend in supported:
            assert resolve_fp8_backend(backend, fp8_recipe) == backend
        else:
            with pytest.raises(ValueError, match=f"^fp8_backend={backend}: .*{fp8_recipe}"):
                resolve_fp8_backend(backend, fp8_recipe)


def test_the_configuration_imports_nothing_heavy():
    modules = "pixart.recipes, pixart.config.overrides, pixart.config.reference, pixart.config.toml_file"
    code = f"import sys, {modules}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
