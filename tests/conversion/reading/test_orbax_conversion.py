"""Conversion of a checkpoint of the original JAX training to FP8, and the commands of the launcher with it."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from conversion.convert import convert
from conversion.options import Options
from conversion.reading import equinox
from conversion.report.text import describe
from jobs import launch
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import Recipe, to_json
from pixart.data import manifest as manifests
from pixart.model.dit import DiT
from pixart.sampling import loading
from pixart.training.loop import train
from pixart.training.metrics import NullReporter
from tests.support.equinox_model import (
    SIZES,
    check_output,
    read,
    tensors,
)

Q_NORM = "dit_blocks.0.attention.attention.q_norm"
pytestmark = pytest.mark.usefixtures("without_jax")


def test_export_for_transformer_engine_is_refused(step, tmp_path):
    with pytest.raises(ValueError, match=r"--export transformer-engine: .* bias"):
        convert(step, tmp_path / "out", Options(base_latent_size=8, exports=("transformer-engine",)))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def dataset(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of a dataset of pixels in [0, 1], as those of the original training."""
    from jobs.tasks import caption, init_dataset, latents

    path = str(tmp_path_factory.mktemp("dataset") / "pixels")
    data = dataclasses.replace(small_recipe.data, path=path, pixel_range=(0, 1))
    recipe = dataclasses.replace(small_recipe, data=data)
    init_dataset.run(to_json(recipe))
    shards = list(range(data.num_shards))
    caption.run(path, shards)
    latents.run(path, shards)
    return recipe


@pytest.mark.slow
def test_conversion_passes_its_acceptance_checks_and_trains_in_fp8(step, dataset, tmp_path):
    options = Options(
        num_batches=4,
        batch_size=16,
        text_dim=manifests.read(dataset.data.path).text_dim,
        base_latent_size=8,
        exports=("inference", "torchao"),
    )
    report = convert(step, tmp_path / "converted", options)
    assert report["acceptance"]["passed"], report["acceptance"]
    assert report["calibration_data"].startswith("synthetic")
    assert report["dropped_tensors"] == {equinox.DROPPED_REASON: SIZES["blocks"]}
    assert f"dropped     {SIZES['blocks']} k_norm.bias" in describe(report)
    assert "k_norm.bias" in (tmp_path / "converted/report.html").read_text()
    provenance = report["tensor_provenance"]
    assert provenance[f"{Q_NORM}.bias"] == "carried"
    assert provenance["dit_blocks.0.cross_attention.q_norm.bias"] == "new"
    assert not any("k_norm.bias" in name for name in provenance)
    source, start = read(step), checkpoints.load(tmp_path / "converted")
    for name in (f"{Q_NORM}.bias.exp_avg", f"{Q_NORM}.bias.exp_avg_sq", f"{Q_NORM}.bias.step"):
        assert torch.equal(start.optimizer[name], source.optimizer[name])
    assert not start.model["dit_blocks.0.cross_attention.q_norm.bias"].any()
    assert start.normalization == source.normalization
    exported, _ = loading.load(tmp_path / "converted/inference")
    bias = start.ema[f"{Q_NORM}.bias"].bfloat16()
    assert torch.equal(exported.get_parameter(f"{Q_NORM}.bias").bfloat16(), bias)
    assert bias.any()

    last = train(
        stage=2,
        model=dataset.model,
        config=dataset.stage2,
        dataset=dataset.data.path,
        run=tmp_path / "run",
        start=tmp_path / "converted",
        reporter=NullReporter(),
    )
    end = checkpoints.load(last)
    assert (end.step, end.plan is None) == (dataset.stage2.steps, False)
    for name in (f"{Q_NORM}.bias", "dit_blocks.0.cross_attention.q_norm.bias"):
        assert torch.isfinite(end.model[name]).all()
        assert not torch.equal(end.model[name], start.model[name]), name
    assert float(end.optimizer[f"{Q_NORM}.bias.step"]) == source.step + end.step


def test_dataset_of_another_pixel_range_is_refused(step, small_recipe, tmp_path):
    options = Options(calibration_dataset=small_recipe.data.path, base_latent_size=8)
    with pytest.raises(ValueError, match=r"data\.pixel_range"):
        convert(step, tmp_path / "out", options)


@pytest.mark.slow
def test_conversion_of_the_original_training(shared_data, tmp_path):
    """Three steps after a random initialization, no modulation of stage 2 fits; the stage is kept."""
    report = convert(shared_data / "jax/stage1", tmp_path / "out", Options(stage=1))
    assert report["acceptance"]["passed"], report["acceptance"]
    assert report["source"] == str(shared_data / "jax/stage1/3")
    expected = tensors(dict(np.load(shared_data / "jax/expected.npz")))
    for folder, output in (("transformer", "out"), ("ema", "ema")):
        model = DiT.from_pretrained(tmp_path / "out" / folder)
        with torch.no_grad():
            check_output(model(expected["x"], expected["t"], expected["lab"].long()), expected[output])


@pytest.mark.slow
def test_commands_of_the_launcher(step, tmp_path, capsys):
    """`convert` writes beside the newest step, and `sample` and the exported pipeline sample the EMA weights."""
    words = ["--home", str(tmp_path / "home"), "--cluster", "local"]
    options = ["--stage", "1", "--base-latent-size", "8", "--num-batches", "4", "--batch-size", "16"]
    assert launch.main(["convert", str(step.parent), *options, *words]) == 0
    assert f"converted: {step}.fp8" in capsys.readouterr().out
    assert checkpoints.load(f"{step}.fp8").step == 3

    settings = ["data.image_size=64", "model.base_latent_size=8", "sample.steps=3", "sample.guidance=1"]
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--vae", "demo", "--class", "2", "--export-pipeline", str(tmp_path / "pipeline")]
    assert launch.main(["sample", str(step.parent), *words]) == 0
    (image,) = (tmp_path / "home").glob("runs/*-sample-*/samples/*.png")
    assert Image.open(image).text["checkpoint"] == str(step)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    assert pipeline.config.pixel_range == [0, 1]
    assert torch.equal(pipeline.transformer.get_parameter(f"{Q_NORM}.bias"), read(step).ema[f"{Q_NORM}.bias"])
