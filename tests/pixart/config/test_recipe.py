import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from pixart.config.captions import visible_attributes
from pixart.config.keys import overrides, toml_file
from pixart.config.model import ModelConfig
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
    with pytest.raises(ValueError, match="blur"):
        from_json(text)


def test_the_original_training():
    """The values that the original training ran with, and that `xl` does not have."""
    recipe = RECIPES["xl-mxfp8"]("home")
    assert recipe.model == RECIPES["xl"]("home").model == ModelConfig()
    for stage in (recipe.stage1, recipe.stage2):
        assert (stage.lr, stage.warmup_steps, stage.min_lr_ratio, stage.weight_decay) == (1e-4, 0, 1.0, 0.03)
        assert (stage.beta1, stage.beta2, stage.eps, stage.max_grad_norm) == (0.9, 0.999, 1e-15, None)
        assert 1 - stage.ema_decay**100 == pytest.approx(0.01, rel=0.01)
    assert (recipe.stage1.steps, recipe.stage1.cond_dropout_prob, recipe.stage1.fp8) == (300_000, 0.1, False)
    stage2 = recipe.stage2
    assert (stage2.steps, stage2.cond_dropout_prob, stage2.fp8, stage2.fp8_recipe) == (150_000, 0, True, "mxfp8")
    assert (recipe.stage1.decay_qk_norm, stage2.decay_qk_norm) == (False, True)
    assert stage2.global_batch_size == 320 * stage2.gradient_accumulation_steps * 8 == 10_240
    assert resolve_fp8_backend(stage2.fp8_backend, stage2.fp8_recipe) == "te"
    assert recipe.data.pixel_range == (0, 1)
    assert recipe.data.captions == visible_attributes()


def test_no_clipping_is_written_none(tmp_path):
    recipe = overrides.apply(RECIPES["demo"]("home"), ["stage1.max_grad_norm=none"])
    assert recipe.stage1.max_grad_norm is None
    (tmp_path / "run.toml").write_text(toml_file.dumps(recipe))
    assert 'max_grad_norm = "none"' in (tmp_path / "run.toml").read_text()
    assert overrides.apply(RECIPES["demo"]("home"), toml_file.load(tmp_path / "run.toml").overrides) == recipe
    with pytest.raises(ValueError, match=r"^stage1\.max_grad_norm='off': must be a number or none"):
        overrides.apply(recipe, ["stage1.max_grad_norm=off"])


@pytest.mark.parametrize("name", ["demo", "xl"])
def test_the_stages_of_a_recipe_differ_in_length_and_precision_only(name):
    recipe = RECIPES[name]("home")
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
    modules = "pixart.recipes, pixart.config.keys.overrides, pixart.config.keys.reference, pixart.config.keys.toml_file"
    code = f"import sys, {modules}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
