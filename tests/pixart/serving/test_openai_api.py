"""The images API with OpenAI's own client, compared bit for bit with the sample job."""

import base64
import dataclasses
import io
import json
import urllib.request
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from PIL import Image

from conversion.export.writers import export_inference
from jobs import launch
from jobs.tasks import sample
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import to_json
from pixart.demo.scenes import SHAPES
from pixart.model.fp8.plan import Plan
from pixart.sampling.png import XMP_CHUNK
from pixart.serving.provenance import DIGITAL_SOURCE_TYPE
from tests.support.serving_fixture import GUIDANCE, STEPS, RunningServer

PROMPT = "a red circle"


def client(server: RunningServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def opened(image) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.b64_json)))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def sampled(server: RunningServer, folder: Path, seed: int = 0, **request) -> Image.Image:
    """Return the single image that the sample job makes."""
    folder.mkdir()
    recipe = launch_recipe(server, seed)
    (folder / "config.json").write_text(recipe)
    sample.run(str(folder), **{"checkpoint": str(server.checkpoint), "prompts": [], "classes": [], **request})
    (file,) = (folder / "samples").glob("*.png")
    return Image.open(file)


def launch_recipe(server: RunningServer, seed: int) -> str:
    from pixart.config.keys import overrides

    return to_json(overrides.apply(server.recipe, [f"sample.seed={seed}"]))


def test_an_image_has_the_bits_of_the_sample_job(text_server, tmp_path):
    for number, weights in enumerate(("ema", "master")):
        answer = client(text_server).images.generate(prompt=PROMPT, extra_body={"seed": 7, "weights": weights})
        (image,) = answer.data
        expected = sampled(text_server, tmp_path / f"{number}", seed=7, prompts=[{"prompt": PROMPT}], weights=weights)
        assert np.array_equal(pixels(opened(image)), pixels(expected))
        assert (image.batch_size, image.seed, image.revised_prompt, image.url) == (1, 7, None, None)
        assert answer.size == "64x64"


def test_fp8_weights_are_served(saved_models, serve, tmp_path):
    """An image of the FP8 export has the bits of `sample` with it, and differs from the EMA weights' image."""
    linear = "dit_blocks.0.mlp.linear1"
    state = checkpoints.load(saved_models.checkpoints[2])
    scales = {f"{linear}.scale": torch.tensor([50.0, 1.0, 1.0])}
    folder = checkpoints.save(state, tmp_path / "checkpoint")
    export_inference(dataclasses.replace(state, plan=Plan(linears=(linear,)), scales=scales), folder)
    models = dataclasses.replace(saved_models, checkpoints={2: folder})
    server = serve(models=models, weights=("fp8", "ema"))
    images = {
        weights: client(server).images.generate(prompt=PROMPT, extra_body={"seed": 7, "weights": weights}).data[0]
        for weights in ("fp8", "ema")
    }
    expected = sampled(server, tmp_path / "run", seed=7, prompts=[{"prompt": PROMPT}], checkpoint=f"{folder}/inference")
    assert np.array_equal(pixels(opened(images["fp8"])), pixels(expected))
    assert opened(images["fp8"]).text["weights"] == "ema in FP8"
    assert np.abs(pixels(opened(images["fp8"])) - pixels(opened(images["ema"]))).max() > 0


def test_other_settings_are_those_of_the_sample_job(text_server, tmp_path):
    body = {"seed": 3, "steps": 2, "guidance": 1}
    (image,) = client(text_server).images.generate(prompt=PROMPT, extra_body=body).data
    from pixart.config.keys import overrides

    folder = tmp_path / "run"
    folder.mkdir()
    settings = ["sample.seed=3", "sample.steps=2", "sample.guidance=1"]
    (folder / "config.json").write_text(to_json(overrides.apply(text_server.recipe, settings)))
    sample.run(str(folder), checkpoint=str(text_server.checkpoint), prompts=[{"prompt": PROMPT}], classes=[])
    expected = Image.open(folder / "samples/0000.png")
    assert np.array_equal(pixels(opened(image)), pixels(expected))


def test_images_of_one_request_differ_by_rounding_from_single_ones(text_server, tmp_path):
    images = client(text_server).images.generate(prompt=PROMPT, n=3, extra_body={"seed": 20}).data
    assert [image.seed for image in images] == [20, 21, 22]
    assert {image.batch_size for image in images} == {3}
    expected = sampled(text_server, tmp_path / "run", seed=21, prompts=[{"prompt": PROMPT}])
    assert np.abs(pixels(opened(images[1])) - pixels(expected)).max() <= 1
    assert np.abs(pixels(opened(images[0])) - pixels(expected)).max() > 10


def test_a_random_seed_is_reported(text_server):
    images = [client(text_server).images.generate(prompt=PROMPT).data[0] for _ in range(2)]
    assert images[0].seed != images[1].seed
    again = client(text_server).images.generate(prompt=PROMPT, extra_body={"seed": images[0].seed}).data[0]
    assert np.array_equal(pixels(opened(again)), pixels(opened(images[0])))


def test_a_png_has_its_provenance_and_lineage(text_server, tmp_path, capsys):
    (image,) = client(text_server).images.generate(prompt="ein Stern ★", extra_body={"seed": 5}).data
    png = opened(image)
    text = dict(png.text)
    assert DIGITAL_SOURCE_TYPE in text.pop(XMP_CHUNK)
    assert b"trainedAlgorithmicMedia" in png.info["xmp"]
    command = text.pop("command")
    assert f"sample {text_server.checkpoint} --prompt 'ein Stern ★'" in command
    assert (
        text.items()
        >= {
            "prompt": "ein Stern ★",
            "seed": "5",
            "steps": str(STEPS),
            "guidance": str(GUIDANCE),
            "size": "64x64",
            "batch_size": "1",
            "weights": "ema",
            "checkpoint": str(text_server.checkpoint),
            "run": str(text_server.folder),
            "dataset": text_server.recipe.data.path,
        }.items()
    )
    file = tmp_path / "image.png"
    file.write_bytes(base64.b64decode(image.b64_json))
    assert launch.main(["lineage", str(file), "--home", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert str(text_server.checkpoint) in shown
    assert text_server.recipe.data.path in shown
    assert "xpacket" not in shown


def test_an_edited_prompt_keeps_the_request(text_server):
    """The answer and the PNG have both; the bits are those of the edited prompt."""
    body = {"seed": 7, "revised_prompt": "a red circle on a white background"}
    (image,) = client(text_server).images.generate(prompt=PROMPT, extra_body=body).data
    assert (image.prompt, image.revised_prompt) == (PROMPT, body["revised_prompt"])
    text = opened(image).text
    assert (text["request"], text["prompt"]) == (PROMPT, body["revised_prompt"])
    assert f"--prompt '{body['revised_prompt']}'" in text["command"]
    (same,) = client(text_server).images.generate(prompt=body["revised_prompt"], extra_body={"seed": 7}).data
    assert np.array_equal(pixels(opened(image)), pixels(opened(same)))
    assert "request" not in opened(same).text


def test_an_image_by_url(text_server):
    (image,) = client(text_server).images.generate(prompt=PROMPT, response_format="url", extra_body={"seed": 7}).data
    assert image.b64_json is None
    by_url = Image.open(io.BytesIO(urllib.request.urlopen(image.url).read()))
    (same,) = client(text_server).images.generate(prompt=PROMPT, extra_body={"seed": 7}).data
    assert np.array_equal(pixels(by_url), pixels(opened(same)))


def test_a_stream_has_previews_and_the_image(text_server):
    stream = client(text_server).images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "steps": 6}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.step for event in events[:2]] == [1, 3]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    (image,) = client(text_server).images.generate(prompt=PROMPT, extra_body={"seed": 7, "steps": 6}).data
    assert np.array_equal(pixels(opened(events[2])), pixels(opened(image)))
    assert not np.array_equal(pixels(opened(events[0])), pixels(opened(image)))
    assert {opened(event).size for event in events} == {(64, 64)}
    assert events[2].seed == 7


def test_all_steps_of_two_images_can_be_streamed(text_server):
    body = {"seed": 7, "steps": 4}
    events = list(
        client(text_server).images.generate(prompt=PROMPT, n=2, stream=True, partial_images=3, extra_body=body)
    )
    steps = {index: [event.step for event in events[:-2] if event.image_index == index] for index in (0, 1)}
    assert steps == {0: [0, 1, 2], 1: [0, 1, 2]}
    assert sorted(event.image_index for event in events[-2:]) == [0, 1]


def test_models_and_health(text_server):
    (model,) = client(text_server).models.list().data
    assert model.id == text_server.checkpoint.name
    assert (model.stage, model.size, model.steps, model.weights) == (2, "64x64", STEPS, ["ema", "master"])
    assert client(text_server).models.retrieve(model.id) == model
    (image,) = client(text_server).images.generate(prompt=PROMPT, model=model.id, size="64x64").data
    assert opened(image).size == (64, 64)
    with urllib.request.urlopen(f"{text_server.url}/health") as response:
        assert json.loads(response.read()) == {"status": "ok"}


def test_metrics_count_images(text_server):
    def value(name: str) -> float:
        lines = urllib.request.urlopen(f"{text_server.url}/metrics").read().decode().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    before = value("pixart_images_total")
    client(text_server).images.generate(prompt=PROMPT, n=2)
    assert value("pixart_images_total") == before + 2
    assert value("pixart_waiting_images") == value("pixart_active_images") == 0
    assert value('pixart_requests_total{status="200"}') > 0
    assert value("pixart_batch_size_count") >= STEPS


def test_classes_of_stage_1(serve, tmp_path):
    server = serve(stage=1)
    (model,) = client(server).models.list().data
    assert model.classes == list(SHAPES)
    for prompt, label in ((SHAPES[2], 2), ("2", 2), ("none", len(SHAPES))):
        (image,) = client(server).images.generate(prompt=prompt, extra_body={"seed": 4}).data
        expected = sampled(server, tmp_path / prompt, seed=4, classes=[label])
        assert np.array_equal(pixels(opened(image)), pixels(expected))
        assert opened(image).text["class_index"] == str(label)
    for prompt in (str(len(SHAPES)), "dog", "-1", "²"):
        with pytest.raises(openai.BadRequestError, match="is no class of this model"):
            client(server).images.generate(prompt=prompt)


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"size": "1024x1024"}, "size", "must be 64x64 or auto"),
        ({"n": 9}, "n", "must be at most 8"),
        ({"model": "dall-e-3"}, "model", "is not served"),
        ({"style": "vivid"}, "style", "unknown parameter"),
        ({"quality": "hd"}, "quality", "Input should be 'auto'"),
        ({"extra_body": {"weights": "fp8"}}, "weights", "must be one of ema, master"),
        ({"extra_body": {"steps": 101}}, "steps", "must be at most 100"),
        ({"extra_body": {"guidance": -1}}, "guidance", "greater than or equal to 0"),
        ({"extra_body": {"seed": 2**63}}, "seed", "less than or equal to"),
        ({"extra_body": {"recaption": True}}, "recaption", "has no model that rewrites prompts"),
        ({"extra_body": {"revised_prompt": " "}}, "revised_prompt", "is empty"),
        ({"prompt": "x" * 4001}, "prompt", "must have at most 4000"),
        ({"prompt": " "}, "prompt", "is empty"),
        ({"extra_body": {"partial_images": 2}}, "partial_images", "in a stream only"),
    ],
)
def test_errors_have_openais_form(text_server, options, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as raised:
        client(text_server).images.generate(**{"prompt": PROMPT, **options})
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"
