"""Sampling of checkpoints of other programs, with a VAE and a text encoder that are named instead of a dataset."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageSequence

from jobs import launch
from pixart.data.encoders.text_encoder import text_dim
from pixart.model.dit import DiT

SIZES = {"in_dim": 16, "dim": 32, "cond_dim": 32, "num_heads": 2, "num_blocks": 1, "base_image_size": 8}
SETTINGS = ("data.image_size=64", "model.base_latent_size=8", "sample.steps=3", "sample.guidance=1")


@pytest.fixture
def pt_file(tmp_path: Path):
    """Callable that writes a `.pt` file of the original training with a random model, and returns its path."""

    def write(**condition: int) -> Path:
        torch.manual_seed(0)
        model = DiT(**SIZES, **condition)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        ema = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
        path = tmp_path / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "model_ema": ema, "step": 41}, path)
        return path

    return write


def run_sample(home: Path, checkpoint: Path, *words: str, settings: tuple[str, ...] = SETTINGS) -> int:
    overrides = [word for setting in settings for word in ("--set", setting)]
    return launch.main(["sample", str(checkpoint), "--home", str(home), "--cluster", "local", *words, *overrides])


def samples(home: Path) -> list[Path]:
    return sorted(home.glob("runs/*-sample-*/samples/*.png"))


@pytest.mark.slow
def test_a_pt_file_of_stage_1_is_sampled_by_class_and_by_the_command_in_the_image(pt_file, tmp_path, capsys):
    path = pt_file(num_classes=5)
    assert run_sample(tmp_path, path, "--vae", "demo", "--class", "2", "--class", "none") == 0
    first, null = samples(tmp_path)
    text = Image.open(first).text
    assert (text["class_index"], text["step"], text["vae"], text["checkpoint"]) == ("2", "42", "demo", str(path))
    assert "dataset" not in text
    assert Image.open(null).text["class_index"] == "4"

    words = shlex.split(text["command"])[3:]
    assert launch.main([*words, "--home", str(tmp_path / "again"), "--cluster", "local"]) == 0
    (again,) = samples(tmp_path / "again")
    assert np.array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(first)))
    capsys.readouterr()
    assert launch.main(["lineage", str(first), "--home", str(tmp_path)]) == 0
    assert str(path) in capsys.readouterr().out


@pytest.mark.slow
def test_a_pt_file_of_stage_2_is_sampled_by_prompt_and_exported_with_its_pixel_range(pt_file, tmp_path, capsys):
    path, target = pt_file(text_dim=text_dim("minilm")), tmp_path / "pipeline"
    words = ("--vae", "demo", "--text-encoder", "minilm", "--export-pipeline", str(target))
    assert run_sample(tmp_path, path, *words, "--prompt", "a red circle") == 0
    assert "guidance is untrained" not in capsys.readouterr().out  # it is sampled without guidance
    (image,) = samples(tmp_path)
    assert (Image.open(image).text["prompt"], Image.open(image).text["text_encoder"]) == ("a red circle", "minilm")
    pipeline = DiffusionPipeline.from_pretrained(target, trust_remote_code=True)
    assert pipeline.config.pixel_range == [0, 1]  # of the original training
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "generator": torch.Generator().manual_seed(0)}
    (again,) = pipeline("a red circle", **settings).images
    assert np.abs(np.asarray(again).astype(int) - np.asarray(Image.open(image))).max() <= 1

    guided = (*SETTINGS[:2], "sample.steps=1", "sample.guidance=3")
    assert run_sample(tmp_path / "guided", path, *words[:4], "--prompt", "a star", settings=guided) == 0
    assert "warning: guidance is untrained" in capsys.readouterr().out


@pytest.mark.slow
def test_frames_are_the_steps_and_the_last_one_is_the_image(pt_file, tmp_path):
    assert run_sample(tmp_path, pt_file(num_classes=5), "--vae", "demo", "--class", "2", "--frames") == 0
    (image,) = samples(tmp_path)
    frames = sorted(image.with_suffix("").glob("step-*.png"))
    assert [frame.name for frame in frames] == ["step-000.png", "step-001.png", "step-002.png"]
    pixels = [np.asarray(Image.open(frame)) for frame in frames]
    assert np.array_equal(pixels[2], np.asarray(Image.open(image)))
    assert not np.array_equal(pixels[0], pixels[1])
    with Image.open(image.with_suffix(".gif")) as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
    assert len(durations) == 3
    assert durations[-1] > durations[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("condition", "words", "message"),
    [
        ({"num_classes": 5}, ("--vae", "demo", "--prompt", "a star"), "is a checkpoint of stage 1"),
        ({"num_classes": 5}, ("--vae", "demo", "--class", "7"), "--class 7: the classes are 0 to 3, and none"),
        ({"num_classes": 5}, ("--vae", "demo", "--class", "cat"), "without a dataset, a class is given by its index"),
        ({"num_classes": 5}, ("--class", "1"), "give --dataset, or --vae and, for stage 2, --text-encoder"),
        (
            {"num_classes": 5},
            ("--vae", "nowhere", "--class", "1"),
            "'nowhere' is neither a model folder nor a model on",
        ),
        ({"text_dim": 48}, ("--vae", "demo", "--text-encoder", "minilm", "--prompt", "a"), "reads 48"),
        ({"text_dim": 384}, ("--text-encoder", "minilm", "--prompt", "a"), "give --vae"),
        ({"text_dim": 384}, ("--vae", "demo", "--class", "1"), "is a checkpoint of stage 2"),
        ({"text_dim": 384}, ("--vae", "demo", "--text-encoder", "minilm"), "no captions to sample; give --prompt"),
        ({"text_dim": 384}, ("--vae", "demo", "--dataset", "data", "--prompt", "a"), "give either these or --dataset"),
    ],
)
def test_mismatches_are_refused_in_one_line(pt_file, tmp_path, capsys, condition, words, message):
    assert run_sample(tmp_path, pt_file(**condition), *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not samples(tmp_path)


@pytest.mark.slow
def test_unknown_parts_of_a_checkpoint_are_ignored_on_request(pt_file, tmp_path, capsys):
    path = pt_file(num_classes=5)
    content = torch.load(path)
    torch.save({**content, "teacher": content["model_ema"]}, path)
    words = ("--vae", "demo", "--class", "2")
    assert run_sample(tmp_path, path, *words) == 2
    assert "'teacher' looks like training state" in (error := capsys.readouterr().err)
    assert "--ignore-unknown" in error
    assert run_sample(tmp_path, path, *words, "--ignore-unknown") == 0
    assert len(samples(tmp_path)) == 1
