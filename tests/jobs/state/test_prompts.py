"""Captions of COCO, one of each image."""

import json
from pathlib import Path

import pytest

from jobs.state.prompts import coco_captions


def test_captions_are_the_first_ones_of_distinct_images(tmp_path: Path):
    annotations = [
        {"image_id": image, "id": 10 * image + number, "caption": f"{image}, caption {number} "}
        for image in range(1, 6)
        for number in (3, 1, 2)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": annotations}))
    captions = coco_captions(tmp_path / "captions.json")
    assert sorted(captions) == [f"{image}, caption 1" for image in range(1, 6)]
    assert captions != sorted(captions)


@pytest.mark.parametrize("text", ["[]", "{", '{"annotations": [{"id": 1}]}'])
def test_other_files_are_refused(tmp_path: Path, text: str):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(ValueError, match="is no file of COCO captions"):
        coco_captions(tmp_path / "captions.json")
