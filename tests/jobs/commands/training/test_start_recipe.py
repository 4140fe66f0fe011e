"""The recipe that `train --from CHECKPOINT` takes without --recipe and --config."""

import dataclasses
import json
from pathlib import Path

import pytest

from jobs import launch
from jobs.commands.training.start_recipe import recipe_of_checkpoint
from pixart import records
from pixart.config.keys import overrides
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.recipes import RECIPES, demo

SMALL = ["model.dim=32", "model.num_blocks=2", "stage2.steps=9"]


def save(folder: Path, model: str, *, pixel_range=(-1, 1), dataset: str | None = None, **provenance: str) -> Path:
    """Write the metadata of a stage-2 checkpoint with the model of the recipe `model`; it has no tensors."""
    config = RECIPES[model]("home").model.dit_arguments()
    record = {
        "stage": 2,
        "step": 3,
        "config": {**config, "num_classes": None, "text_dim": 384},
        "dataset": dataset,
        "provenance": provenance,
        "plan": None,
        "normalization": {"mean": [0.0], "std": [1.0], "pixel_range": list(pixel_range)},
        "files": {"state/x": [1, 1]},
    }
    (folder / "state").mkdir(parents=True)
    (folder / "state/x").write_text("x")
    (folder / "training.json").write_bytes(records.dumps({"format": 2, **record}))
    return folder


def make_dataset(folder: Path, source: str, pixel_range=(-1, 1)) -> str:
    data = dataclasses.replace(demo("home").data, path=str(folder), source=source, pixel_range=pixel_range)
    models = {"vae": "aa", "text_encoder": "bb", "captioner": "labels"}
    sizes = {"images": 4, "rows_per_shard": 1, "latent_shape": (16, 8, 8), "text_dim": 384}
    manifests.write(Manifest(data=data, class_names=(), models=models, **sizes))
    return str(folder)


def test_the_run_of_the_checkpoint_has_its_recipe_with_overrides(tmp_path):
    run = tmp_path / "runs/a-train"
    recipe = overrides.apply(RECIPES["xl"](str(tmp_path)), SMALL)
    path = save(run / "checkpoints/step-00000003", "demo", recipe="demo")
    converted = save(run / "checkpoints/step-00000003.fp8", "demo", recipe="demo")
    elsewhere = save(tmp_path / "elsewhere", "demo", recipe="demo", converted_from=str(path))
    (run / "config.json").write_text(to_json(recipe))
    for start in (run, path, converted, elsewhere):
        assert recipe_of_checkpoint(tmp_path, str(start), None) == recipe


def test_the_checkpoint_names_its_recipe(tmp_path):
    path = save(tmp_path / "moved", "demo", recipe="xl-mxfp8")
    assert recipe_of_checkpoint(tmp_path, str(path), None) == RECIPES["xl-mxfp8"](str(tmp_path))


@pytest.mark.parametrize(
    ("model", "pixel_range", "expected"),
    [("demo", (-1, 1), "demo"), ("xl", (-1, 1), "xl"), ("xl", (0, 1), "xl-mxfp8")],
)
def test_the_model_and_the_pixel_range_of_an_imported_checkpoint(tmp_path, model, pixel_range, expected):
    path = save(tmp_path / "imported", model, pixel_range=pixel_range)
    assert recipe_of_checkpoint(tmp_path, str(path), None).name == expected


@pytest.mark.parametrize(
    ("model", "source", "pixel_range", "expected"),
    [
        ("demo", "demo", (-1, 1), "demo"),
        ("xl", "photos", (-1, 1), "xl"),
        ("xl", "photos", (0, 1), "xl-mxfp8"),
        ("demo", "photos", (-1, 1), None),
        ("demo", "demo", (0, 1), None),
        ("xl", "demo", (-1, 1), None),
    ],
)
def test_the_dataset_decides_too(tmp_path, model, source, pixel_range, expected):
    """The dataset is the one that the command names, else the one that the checkpoint was trained on."""
    dataset = make_dataset(tmp_path / "data", source, pixel_range)
    trained = save(tmp_path / "trained", model, dataset=dataset)
    imported = save(tmp_path / "imported", model)
    for path, named in ((trained, None), (imported, dataset)):
        if expected:
            assert recipe_of_checkpoint(tmp_path, str(path), named).name == expected
            continue
        with pytest.raises(ValueError, match=r"no recipe fits its model and the dataset .*; give --recipe NAME, one"):
            recipe_of_checkpoint(tmp_path, str(path), named)


def test_the_demo_recipe_is_refused_for_another_model(tmp_path, capsys, monkeypatch):
    """One line names --recipe, with nothing written; a recipe that is named is not changed."""
    monkeypatch.setenv("PIXART_CLUSTER", "local")
    path = save(tmp_path / "imported", "demo")
    record = json.loads((path / "training.json").read_text())
    record["config"]["dim"] = 64
    (path / "training.json").write_bytes(records.dumps(record))
    words = ["train", "--from", str(path), "--home", str(tmp_path / "home"), "--dry-run"]
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --from {path}: no recipe fits its model; give --recipe NAME, one of demo, xl")
    assert error.count("\n") == 1
    assert not (tmp_path / "home").exists()
    assert launch.main([*words, "--recipe", "demo", "--set", "stage2.fp8=false"]) == 0
