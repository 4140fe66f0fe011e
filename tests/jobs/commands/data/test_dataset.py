"""The description of a new dataset's source."""

import dataclasses
import json

from jobs.commands.data.dataset import describe_contents
from jobs.tasks import init_dataset
from pixart.config.recipe import to_json
from pixart.data.manifest import read
from pixart.recipes import demo
from tests.pixart.data.sources.test_sources import noise_image, write


def created(tmp_path, **changes):
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, source=f"{tmp_path}/images", max_images=None, **changes)
    init_dataset.run(to_json(dataclasses.replace(recipe, data=data)))
    return data.path, json.loads(json.dumps(dataclasses.asdict(read(data.path))))


def test_a_source_without_words_is_reported(tmp_path):
    for name in ("a.jpg", "b.gif", "c.pdf", "d.pdf"):
        write(f"{tmp_path}/images/{name}", noise_image(1))
    path, manifest = created(tmp_path)
    assert describe_contents(path, manifest).splitlines() == [
        "source: 2 items, none with a label, 0 class names, none with words",
        "left out: 2 suffix .pdf",
        "warning: no item has words; set data.captioner=vllm, or name the captions by data.columns.caption",
    ]


def test_classes_and_words_are_reported(tmp_path):
    for name in ("cat/a.jpg", "dog/b.jpg", "c.jpg"):
        write(f"{tmp_path}/images/{name}", noise_image(1))
    path, manifest = created(tmp_path)
    assert describe_contents(path, manifest) == "source: 3 items, 2 with labels up to 1, 2 class names, with words\n"
