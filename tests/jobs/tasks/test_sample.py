"""The sample job with tiny models: its images and their metadata."""

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from conversion.export.writers import export_inference
from jobs import launch
from jobs.commands.results.sample import Options
from jobs.commands.results.sampling_checks import class_index
from jobs.tasks import sample
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.config.keys import overrides
from pixart.config.recipe import Recipe, to_json
from pixart.data import manifest as manifests
from pixart.data.encoders.text_encoder import text_dim
from pixart.demo.scenes import SHAPES
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan
from pixart.sampling import loading
from pixart.sampling.contact_sheet import LINE
from pixart.training.loop import train
from tests.pixart.data.captions.test_rewriting import url  # noqa: F401 - a fixture

SIZES = {"in_dim": 16, "dim": 32, "cond_dim": 32, "num_heads": 2, "num_blocks": 1, "base_image_size": 8}
COMMIT = 40 * "a"


def random_state(seed: int, **sizes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = DiT(**{**SIZES, **sizes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.state_dict()


def checkpoint_of(recipe: Recipe, stage: int, **sizes: int) -> Checkpoint:
    """Return a checkpoint of a stage with random weights for the recipe's dataset; `sizes` replace those of SIZES."""
    kind = {"num_classes": len(SHAPES) + 1} if stage == 1 else {"text_dim": text_dim("minilm")}
    kind |= sizes
    return Checkpoint(
        stage=stage,
        step=70 + stage,
        config={**SIZES, **kind},
        model=random_state(0, **kind),
        ema=random_state(1, **kind),
        optimizer={},
        normalization=Normalization(mean=(0.1,) * 16, std=(0.9,) * 16),
        dataset=recipe.data.path,
    )


@pytest.fixture(scope="module")
def saved(small_recipe, tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {stage: checkpoints.save(checkpoint_of(small_recipe, stage), folder / f"{stage}") for stage in (1, 2)}


@pytest.fixture
def paint(small_recipe, tmp_path):
    """Callable that runs the job in a separate folder and returns the folder and the result."""

    def run(checkpoint: Path, *settings: str, name: str = "run", **request) -> tuple[Path, dict]:
        folder = tmp_path / name
        folder.mkdir()
        recipe = overrides.apply(small_recipe, ["sample.steps=2", "sample.seed=40", *settings])
        (folder / "config.json").write_text(to_json(recipe))
        (folder / "git.txt").write_text(f"commit {COMMIT}\n\n")
        return folder, sample.run(
            str(folder), **{"checkpoint": str(checkpoint), "prompts": [], "classes": [], **request}
        )

    return run


def pictures(folder: Path) -> list[Image.Image]:
    return [Image.open(file) for file in sorted((folder / "samples").glob("*.png"))]


def test_png_metadata_reproduces_the_image(paint, saved, small_recipe):
    prompts = [{"prompt": "a red circle"}, {"prompt": "ein grüner Stern ★", "request": "Stern"}]
    folder, result = paint(saved[2], prompts=prompts, per_prompt=2)
    images = pictures(folder)
    assert [image.text["seed"] for image in images] == ["40", "41", "42", "43"]
    assert [image.text.get("request") for image in images] == [None, None, "Stern", "Stern"]
    request = {"prompt": "ein grüner Stern ★", "request": "Stern", "seed": "43"}
    shared = {
        "steps": "2",
        "guidance": "2.0",
        "checkpoint": str(saved[2]),
        "step": "72",
        "stage": "2",
        "weights": "ema",
        "run": str(folder),
        "dataset": small_recipe.data.path,
        "dataset_hash": manifests.read(small_recipe.data.path).hash,
        "commit": COMMIT,
    }
    command = images[3].text["command"]
    assert images[3].text == {**request, **shared, "size": "64x64", "command": command}
    sheet = Image.open(result["sheet"]).text
    assert {name: sheet[name] for name in shared} == shared
    assert json.loads(sheet["pictures"])[3] == request
    assert json.loads((folder / "samples.json").read_text())["pictures"][3] == request

    _, options = launch.parse_command(shlex.split(command)[3:])
    assert isinstance(options, Options)
    again, _ = paint(
        Path(options.checkpoint),
        *options.overrides,
        name="again",
        weights=options.weights,
        prompts=[{"prompt": text} for text in options.prompts],
    )
    (single,) = pictures(again)
    difference = np.abs(np.asarray(single).astype(int) - np.asarray(images[3]))
    assert difference.max() <= 1  # another batch size rounds differently
    assert np.abs(np.asarray(single).astype(int) - np.asarray(images[2])).max() > 10
    assert options.dataset == small_recipe.data.path


def test_sizes_in_one_run_have_the_shift_of_their_area(paint, small_recipe, tmp_path):
    checkpoint = checkpoint_of(small_recipe, 1)
    checkpoint.provenance = {"time_shift": "auto", "image_shapes": [[64, 128], [128, 64]], "downsampling_factor": 8}
    path = checkpoints.save(checkpoint, tmp_path / "buckets")
    folder, _ = paint(path, classes=[1], name="default")
    assert [image.size for image in pictures(folder)] == [(128, 64)]
    folder, _ = paint(path, classes=[1, 2], name="sizes", sizes=[[128, 64], [64, 64]])
    images = pictures(folder)
    assert [image.size for image in images] == [(64, 128)] * 2 + [(64, 64)] * 2
    assert [image.text["seed"] for image in images] == ["40", "41", "42", "43"]
    assert "--size 64x128 --force-size" in images[0].text["command"]
    folder, _ = paint(path, "sample.seed=41", classes=[2], name="again", sizes=[[128, 64]])
    difference = np.abs(np.asarray(pictures(folder)[0]).astype(int) - np.asarray(images[1]))
    assert difference.max() <= 1
    with pytest.raises(ValueError, match="width=72: must be a positive multiple of 16"):
        paint(path, classes=[1], name="odd", sizes=[[64, 72]])


def test_a_pipeline_of_a_checkpoint_has_its_shift_and_shape(small_recipe):
    record = {"provenance": {"time_shift": "auto", "image_shapes": [[64, 128]], "downsampling_factor": 8}}
    start = checkpoints.record_of(checkpoint_of(small_recipe, 1))
    components = loading.Components.of_dataset(manifests.read(small_recipe.data.path))
    model = DiT(**SIZES, num_classes=len(SHAPES) + 1)
    pipeline = loading.build_pipeline(model, {**start, **record}, components, name="step")
    assert pipeline.default_latent_size == (8, 16)
    assert pipeline.scheduler.config.shift == pytest.approx(2**0.5)
    assert pipeline.scheduler_of(16, 16).config.shift == pytest.approx(2)
    old = loading.build_pipeline(model, start, components, name="step")
    assert (old.default_latent_size, old.scheduler.config.shift, old.config.shift_by_area) == ((8, 8), 1, False)


def test_classes(paint, saved):
    folder, _ = paint(saved[1], "sample.count=3")
    images = pictures(folder)
    assert [image.text["class"] for image in images] == list(SHAPES[:3])  # one image of each of the first classes
    folder, _ = paint(saved[1], name="named", classes=[2, 4], per_prompt=2)
    named = pictures(folder)
    assert [(image.text["class"], image.text["class_index"]) for image in named] == [
        *[(SHAPES[2], "2")] * 2,
        *[("none", "4")] * 2,
    ]
    folder, _ = paint(saved[1], "sample.guidance=1", name="plain", classes=[2, 4], per_prompt=2)
    changed = [
        int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())
        for one, other in zip(named, pictures(folder), strict=True)
    ]
    assert min(changed[:2]) > 5  # guided against the null class
    assert max(changed[2:]) <= 1  # guidance does not affect the null class


def test_a_class_by_name_or_index():
    assert [class_index(name, ["cat", "7", "dog"], 9) for name in ("dog", "7", "0", "none")] == [2, 1, 0, 8]
    assert class_index("7", [], 9) == 7
    for name, names in (("3", ["cat", "7", "dog"]), ("8", []), ("owl", ["cat"]), ("-1", [])):
        with pytest.raises(ValueError, match=f"^--class {name}: the classes are 0 to "):
            class_index(name, names, 9)


def test_weights_option_selects_ema_master_weights_and_fp8(paint, saved, small_recipe, tmp_path):
    linear = "dit_blocks.0.mlp.linear1"
    state = checkpoint_of(small_recipe, 2)
    state = dataclasses.replace(
        state, plan=Plan(linears=(linear,)), scales={f"{linear}.scale": torch.tensor([50.0, 1.0, 1.0])}
    )
    export_inference(state, tmp_path)
    images = {}
    for name, checkpoint, weights in (
        ("average", saved[2], "ema"),
        ("master", saved[2], "master"),
        ("fp8", tmp_path / "inference", "ema"),
    ):
        folder, _ = paint(checkpoint, name=name, weights=weights, prompts=[{"prompt": "a star"}])
        (image,) = pictures(folder)
        images[name] = np.asarray(image).astype(int)
        assert (image.text["weights"], image.text["step"]) == ("ema in FP8" if name == "fp8" else weights, "72")
    assert np.abs(images["average"] - images["master"]).max() > 20
    assert 0 < np.abs(images["average"] - images["fp8"]).mean() < 5


def test_training_run_is_sampled_and_exported(paint, small_recipe, tmp_path):
    run = tmp_path / "training"
    last = train(
        stage=1,
        model=small_recipe.model,
        config=small_recipe.stage1,
        dataset=small_recipe.data.path,
        run=run,
        start=None,
    )
    images = []
    for weights in ("ema", "master"):
        target = str(tmp_path / f"{weights}-pipeline")
        folder, _ = paint(run, name=weights, weights=weights, classes=[1], export=target)
        (image,) = pictures(folder)
        assert (image.text["checkpoint"], image.text["step"]) == (str(last), "6")
        state = getattr(checkpoints.load(last), "ema" if weights == "ema" else "model")
        exported = DiffusionPipeline.from_pretrained(target, trust_remote_code=True).transformer.state_dict()
        assert all(torch.equal(exported[name], state[name]) for name in state)
        images.append(np.asarray(image))
    assert not np.array_equal(*images)


def test_another_vae_of_the_same_name_is_refused(paint, saved, small_recipe, tmp_path):
    made = manifests.read(small_recipe.data.path)
    data = dataclasses.replace(made.data, path=str(tmp_path / "data"))
    manifests.write(dataclasses.replace(made, data=data, models={**made.models, "vae": "another"}))
    with pytest.raises(ValueError, match="its vae has changed since the dataset was created"):
        paint(saved[2], f"data.path={tmp_path}/data", prompts=[{"prompt": "a star"}])


def test_rewritten_prompts_are_read_from_the_job_before(paint, saved, tmp_path):
    line = {"request": "Hund", "text": "A brown dog on grass.", "problem": ""}
    (tmp_path / "rewritten.jsonl").write_text(json.dumps(line) + "\n")
    folder, _ = paint(saved[2], rewritten=str(tmp_path / "rewritten.jsonl"))
    (image,) = pictures(folder)
    assert (image.text["prompt"], image.text["request"]) == ("A brown dog on grass.", "Hund")
    plain, _ = paint(saved[2], name="plain", prompts=[{"prompt": "A brown dog on grass."}])
    heights = [Image.open(folder_of_run / "samples.png").height for folder_of_run in (plain, folder)]
    assert heights[1] == heights[0] + LINE  # the request takes one more line


def test_demo_scenes_are_counted(paint, saved):
    folder, result = paint(saved[2], "sample.count=3", per_prompt=2)
    assert result["prompts"] == len(pictures(folder)) == 6
    assert {"color", "shape"} <= result.keys()


def test_exported_pipeline_gives_identical_images(paint, saved, tmp_path):
    target = tmp_path / "pipeline"
    folder, _ = paint(saved[2], prompts=[{"prompt": "a star"}, {"prompt": "a cyan circle"}], export=str(target))
    image = pictures(folder)[1]
    pipeline = DiffusionPipeline.from_pretrained(target, trust_remote_code=True)
    generator = torch.Generator().manual_seed(int(image.text["seed"]))
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "generator": generator}
    (again,) = pipeline(image.text["prompt"], **settings).images
    assert np.abs(np.asarray(again).astype(int) - np.asarray(image)).max() <= 1
    assert json.loads((target / "origin.json").read_text())["checkpoint"] == str(saved[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("probability", "guidance", "warned"), [(0.0, 2.0, True), (0.0, 1.0, False), (0.1, 2.0, False), (None, 2.0, False)]
)
def test_a_warning_of_untrained_guidance(small_recipe, tmp_path, capsys, probability, guidance, warned):
    provenance = {} if probability is None else {"cond_dropout_prob": probability}
    checkpoint = dataclasses.replace(checkpoint_of(small_recipe, 2), provenance=provenance)
    path = checkpoints.save(checkpoint, tmp_path / "checkpoint")
    words = ["--home", str(tmp_path), "--cluster", "local", "--dry-run", "--set", f"sample.guidance={guidance}"]
    assert launch.main(["sample", str(path), *words]) == 0
    expected = f"warning: guidance is untrained: {path} was trained with cond_dropout_prob=0" if warned else ""
    error = capsys.readouterr().err
    assert error.startswith(expected)
    assert error.count("\n") == warned


@pytest.mark.slow
def test_commands_rewrite_and_export(saved, url, tmp_path, capsys):  # noqa: F811
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red ball"}\n\n{"text": "blue ball", "request": "ball"}\n')
    settings = ["--home", str(tmp_path), "--cluster", "local", "--set", "sample.steps=1"]
    words = ["--prompt", "long", "--file", str(tmp_path / "prompts.jsonl"), "--recaption", "--server", url]
    assert launch.main(["sample", str(saved[2]), *settings, *words]) == 0
    printed = capsys.readouterr()
    assert "unchanged (not answered): long" in printed.err
    sheet = Path(next(line for line in printed.out.splitlines() if line.startswith("sampled: ")).split()[1])
    texts = [(image.text["request"], image.text["prompt"]) for image in pictures(sheet.parent)]
    assert texts == [
        ("long", "long"),
        ("red ball", "A red ball, some-model, seed 0."),
        ("blue ball", "A blue ball, some-model, seed 0."),
    ]
    target = tmp_path / "exported"
    assert launch.main(["sample", str(saved[1]), *settings, "--export-pipeline", str(target)]) == 0
    assert f"exported: {target}" in capsys.readouterr().out.splitlines()
    assert (target / "model_index.json").exists()
    assert not list((tmp_path / "runs").glob("*/samples.png"))[1:]  # exporting alone creates no images
