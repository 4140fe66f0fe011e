import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pixart.data.captions.captioner import (
    MAX_PIXELS,
    CaptionRequest,
    class_caption,
    indefinite_article,
    make_captioner,
    resize_for_model,
)
from pixart.data.images.screening import digest
from pixart.data.sources.base import Item
from pixart.data.sources.open import open_source
from tests.support.vllm_fixture import PYTHON, ROOT, VARIABLES, needs_vllm

PHOTOS = ROOT / "../shared/data/photos"


def item(text: str, text_is_class: bool = False) -> Item:
    return Item(id="0", data=b"", label=0, text=text, text_is_class=text_is_class)


def requests(items: list[Item]) -> Iterator[CaptionRequest]:
    for row, source_item in enumerate(items):
        yield CaptionRequest(row=row, image=Image.new("RGB", (8, 8)), item=source_item, digest=digest(source_item.data))


def test_labels_captioner_uses_the_texts_of_items():
    captioner = make_captioner("labels", model="")
    items = [item("a red circle on the left"), item(""), item("brown bear", True), item("airliner", True)]
    captions = dict(captioner.stream(requests(items)))
    assert [captions[row].text for row in range(4)] == [
        "a red circle on the left",
        "",
        "a photo of a brown bear",
        "a photo of an airliner",
    ]
    assert captioner.name == "labels"


def test_labels_captioner_uses_the_captions_of_the_demo():
    items = list(open_source("demo", max_images=5, image_size=16).read(0, 5))
    captions = dict(make_captioner("labels", model="").stream(requests(items)))
    assert [captions[row].text for row in range(5)] == [item.text for item in items]
    assert all(caption.text.count(" ") > 4 for caption in captions.values())


def test_indefinite_article_depends_on_the_sound():
    vowels = "acorn American_alligator Indian_cobra eft echidna umbrella upright hourglass honest_man unimportant_thing"
    consonants = (
        "brown_bear European_gallinule unicycle uniform ukulele one-armed_bandit horse yurt ewer x-ray used_car"
    )
    assert [word for word in vowels.split() if indefinite_article(word) != "an"] == []
    assert [word for word in consonants.split() if indefinite_article(word) != "a"] == []


def test_class_caption_uses_the_first_of_several_names():
    assert class_caption("ox, Bos taurus") == "a photo of an ox"


def test_unknown_captioner_is_an_error():
    with pytest.raises(ValueError, match=r"^captioner 'blip': must be labels or vllm$"):
        make_captioner("blip", model="")


def test_missing_vllm_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # its import fails
    with pytest.raises(ValueError, match=r"^captioner 'vllm': .*install vllm, or choose the captioner 'labels'$"):
        make_captioner("vllm", model="x")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((64, 48), (64, 48)),
        ((512, 512), (512, 512)),
        ((1024, 1024), (512, 512)),
        ((2000, 1500), (576, 416)),
        ((1, 300), (1, 100)),
        ((9000, 30), (3000, 30)),
        ((40000, 100), (3200, 32)),
    ],
)
def test_images_are_resized_as_the_model_does(size, expected):
    resized = resize_for_model(Image.new("RGB", size, "red"))
    assert resized.size == expected
    assert resized.width * resized.height <= MAX_PIXELS
    assert resize_for_model(resized) is resized


SCRIPT = """
import dataclasses, json, os, signal, sys, threading
from pathlib import Path
from PIL import Image
from pixart.data.captions.captioner import CaptionRequest, conversation, make_captioner
from pixart.config.captions import CaptionsConfig
from pixart.data.images.screening import digest
from pixart.data.sources.base import Item

if __name__ == "__main__":
    model, *paths = sys.argv[1:]
    items = [Item(id=path, data=Path(path).read_bytes(), label=-1, text="") for path in paths]
    images = [Image.open(path).convert("RGB") for path in paths]
    requests = [
        CaptionRequest(row=row, image=image, item=item, digest=digest(item.data))
        for row, (image, item) in enumerate(zip(images, items))
    ]
    captioner = make_captioner("vllm", model=model, captions=CaptionsConfig(max_tokens=16), dtype="float32")

    def captions(requests):
        by_row = dict(captioner.stream(requests))
        return [dataclasses.asdict(by_row[row]) for row in sorted(by_row)]

    stream = captioner.stream(requests)
    next(stream)
    stream.close()  # with requests in flight, whose outputs the next stream must not receive
    engine, sampling = captioner._engine, captioner.sampling_params(0, seed=0)
    instruction = captioner.captions.image_instruction
    image = captioner.prepare(images[2])
    chat = engine.chat(conversation(instruction, {"type": "image_pil", "image_pil": image}), sampling, use_tqdm=False)
    prompt = {"prompt_token_ids": captioner._prompt_token_ids, "multi_modal_data": {"image": image}}
    generated = engine.generate(prompt, sampling, use_tqdm=False)
    large = images[6], captioner.prepare(images[6])
    chats = [conversation(instruction, {"type": "image_pil", "image_pil": image}) for image in large]
    outputs = [engine.chat(each, sampling) for each in chats]

    captioner.captions = dataclasses.replace(captioner.captions, temperature=0.9, top_p=0.95, top_k=50)
    sampled = captions(requests), captions(requests[::-1])
    captioner.captions = dataclasses.replace(captioner.captions, temperature=0.0, top_p=1.0, top_k=0)

    result = {
        "sampled": sampled,
        "name": captioner.name,
        "captions": captions(requests),
        "again": captions(requests),
        "reversed": captions(requests[::-1]),
        "none": captions([]),
        "chat": [chat[0].prompt_token_ids, chat[0].outputs[0].text],
        "generated": [generated[0].prompt_token_ids, generated[0].outputs[0].text],
        "tokens": [len(output.prompt_token_ids) for (output,) in outputs],
        "unfinished": engine.llm_engine.get_num_unfinished_requests(),
    }
    for ending in signal.SIGTERM, signal.SIGKILL:
        core = captioner._engine.llm_engine.engine_core
        (process,) = core.resources.engine_manager.processes
        threading.Timer(0.5, os.kill, (process.pid, ending)).start()
        try:
            list(captioner.stream(requests * 40))
            result[ending.name] = "nothing"
        except Exception as error:
            result[ending.name] = type(error).__name__
        if ending == signal.SIGTERM:
            core.shutdown()
            captioner = make_captioner("vllm", model=model, captions=CaptionsConfig(max_tokens=16), dtype="float32")

    with open("result.json", "w") as file:
        json.dump(result, file)
"""
SIZES = [(64, 64), (256, 256), (640, 480), (300, 20), (4, 1000), (1, 1), (2000, 1500)]


def image_files(folder: Path) -> list[Path]:
    """Write scenes of extreme sizes; return their paths and those of some photos, if available."""
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    for path, size, scene in zip(
        paths, SIZES, open_source("demo", max_images=len(SIZES)).read(0, len(SIZES)), strict=True
    ):
        path.write_bytes(scene.data)
        Image.open(path).resize(size).save(path)
    return paths + sorted(PHOTOS.glob("*/*.jpg"))[:5]


@pytest.fixture(scope="module")
def result(tmp_path_factory, tiny_qwen):
    """Caption `image_files` with a tiny model in the Python environment of vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "captions.py").write_text(SCRIPT)
    environment = os.environ | VARIABLES | {"PYTHONPATH": str(ROOT)}
    files = image_files(folder)
    command = [PYTHON, "captions.py", tiny_qwen, *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "result.json").read_text()) | {"files": len(files)}


@pytest.mark.vllm
@needs_vllm
def test_vllm_captions_images_of_every_size(result):
    assert len(result["captions"]) == result["files"] >= len(SIZES)
    texts = [caption["text"] for caption in result["captions"]]
    assert all(text == " ".join(text.split()) for text in texts)
    assert all(caption["text"] or caption["problem"] == "empty" for caption in result["captions"])
    assert result["none"] == []


@pytest.mark.vllm
@needs_vllm
def test_vllm_captions_depend_only_on_the_image(result):
    assert result["again"] == result["captions"]
    texts = [caption["text"] for caption in result["captions"]]
    assert len(set(texts)) > result["files"] / 2  # random weights, but the captions depend on the image
    assert [caption["text"][:8] for caption in result["reversed"]] == [
        text[:8] for text in texts
    ]  # rounding depends on the batch


@pytest.mark.vllm
@needs_vllm
def test_vllm_retries_a_caption_with_a_problem(result):
    """With 16 tokens, most captions are truncated; the second attempt is returned even if it has a problem."""
    assert {caption["seed"] for caption in result["captions"] if caption["problem"]} <= {1}
    assert any(caption["seed"] == 1 for caption in result["captions"])


@pytest.mark.vllm
@needs_vllm
def test_sampled_captions_depend_only_on_the_image_and_its_seed(result):
    once, again = result["sampled"]
    assert [caption["seed"] for caption in once] == [caption["seed"] for caption in again]
    assert len({caption["seed"] for caption in once}) == result["files"]
    assert [caption["text"] for caption in once] != [caption["text"] for caption in result["captions"]]
    equal = sum(first["text"][:8] == second["text"][:8] for first, second in zip(once, again, strict=True))
    assert equal > result["files"] / 2  # rounding depends on the batch


@pytest.mark.vllm
@needs_vllm
def test_prompt_equals_that_of_vllm_chat(result):
    assert result["generated"] == result["chat"]
    assert len(result["chat"][0]) > 100
    assert result["tokens"][0] == result["tokens"][1]  # a large image and its resized copy


@pytest.mark.vllm
@needs_vllm
def test_stream_raises_when_the_engine_exits(result):
    """On SIGTERM the engine aborts its requests; on SIGKILL it sends no more outputs."""
    assert result["SIGTERM"] in ("RuntimeError", "EngineDeadError")
    assert result["SIGKILL"] == "EngineDeadError"


@pytest.mark.vllm
@needs_vllm
def test_closing_a_stream_aborts_its_requests(result):
    assert result["unfinished"] == 0


@pytest.mark.vllm
@needs_vllm
def test_vllm_captioner_name_includes_model_and_settings(result):
    assert result["name"].split("/")[-1].startswith("qwen, vllm 0.")
    assert "temperature 0.0, top_p 1.0, top_k 0, max_tokens 16, instruction " in result["name"]
