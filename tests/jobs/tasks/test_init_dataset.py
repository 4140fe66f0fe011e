import dataclasses
import json
from pathlib import Path

import pytest

from jobs.tasks import init_dataset
from pixart.config.recipe import to_json
from pixart.recipes import demo
from tests.pixart.data.sources.test_sources import ROWS, make_tars


def test_file_index_of_large_files_is_kept_for_the_tasks(tmp_path):
    make_tars(f"{tmp_path}/images")
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, source=f"{tmp_path}/images", max_images=None)
    init_dataset.run(to_json(dataclasses.replace(recipe, data=data)))
    kept = json.loads((Path(data.path) / "source-files.json").read_text())
    assert [rows for _, rows in kept.values()] == [10, 10, ROWS - 20]


@pytest.mark.parametrize("wrong", ["source", "vae", "text_encoder", "caption_model"])
def test_missing_inputs_leave_nothing_written(tmp_path, wrong):
    make_tars(f"{tmp_path}/images")
    recipe = demo(str(tmp_path))
    changes = {"source": f"{tmp_path}/images", "max_images": None, wrong: f"{tmp_path}/nowhere"}
    if wrong == "caption_model":
        changes["captioner"] = "vllm"
    with pytest.raises(ValueError, match="nowhere"):
        init_dataset.run(to_json(dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
