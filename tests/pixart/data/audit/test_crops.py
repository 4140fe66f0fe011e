"""The audit's table of the shapes of the training images."""

import numpy as np
import pyarrow as pa
import pytest

from pixart.config.aspect_buckets import bucket_shapes, kept_fraction, nearest_bucket
from pixart.config.dataset import AuditConfig
from pixart.data.audit.page import page
from pixart.data.audit.statistics import Audit, crop_table, summary
from pixart.data.captions.table import SCHEMA


def part(sizes: list[tuple[int, int]]) -> pa.Table:
    """Return a caption part of valid images of these widths and heights."""
    random = np.random.default_rng(0)
    values = {"caption": "a photo of a cat", "valid": True, "reason": "", "brightness": 0.5, "entropy": 5.0}
    rows = [
        {
            **dict.fromkeys(SCHEMA.names),
            **values,
            "id": str(index),
            "width": width,
            "height": height,
            "phash": int(random.integers(2**63)),
            "digest": random.bytes(16),
        }
        for index, (width, height) in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def test_images_and_cropped_area_by_shape():
    random = np.random.default_rng(1)
    sizes = [tuple(size) for size in random.integers(64, 400, (50, 2)).tolist()]
    shapes = bucket_shapes("64x64,128x32,32x128,96x48", 64)
    audit = Audit(shapes=shapes)
    audit.add(part(sizes[:20]), 0)
    audit.add(part(sizes[20:]), 20)
    rows = crop_table(audit)
    assert [(row["height"], row["width"]) for row in rows] == list(shapes)
    for index, (shape, row) in enumerate(zip(shapes, rows, strict=True)):
        members = [size for size in sizes if nearest_bucket(*size, shapes) == index]
        assert row["images"] == len(members)
        assert row["share"] == len(members) / 50
        assert row["cropped"] == pytest.approx(np.mean([1 - kept_fraction(*size, shape) for size in members]))
        square = np.mean([1 - min(size) / max(size) for size in members])
        assert row["cropped_by_square"] == pytest.approx(square)
    html = page("data", summary(audit, [], AuditConfig()), {}, [], [])
    assert "Shapes of the training images" in html
    assert f"{rows[1]['cropped']:.2%}" in html


def test_datasets_without_buckets_have_one_shape():
    audit = Audit(shapes=((64, 64),))
    audit.add(part([(200, 100), (100, 100)]), 0)
    assert crop_table(audit) == [
        {"width": 64, "height": 64, "images": 2, "share": 1.0, "cropped": 0.25, "cropped_by_square": 0.25}
    ]
