"""Caption parts: one parquet table per shard, with one row per source item in source order."""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from PIL import Image

from pixart.config.dataset import ScreeningConfig
from pixart.data.captions.captioner import MAX_PIXELS, Caption, Captioner, CaptionRequest
from pixart.data.images import screening
from pixart.data.images.screening import ImageStatistics
from pixart.data.prefetch import prefetch_map
from pixart.data.sources.base import Item

CONSTANT = pa.dictionary(pa.int32(), pa.string())  # equal in every row, so stored once
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int32()),  # -1 if the source has no labels
        ("caption", pa.string()),
        ("short_caption", pa.string()),
        ("valid", pa.bool_()),
        ("reason", pa.string()),  # why the image or its caption was rejected; "" for a valid row
        ("detail", pa.string()),
        ("thumbnail", pa.binary()),  # JPEG of a rejected image, if it could be decoded
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("brightness", pa.float32()),
        ("entropy", pa.float32()),
        ("dominant", pa.float32()),
        ("flat", pa.float32()),
        ("gradient", pa.float32()),
        ("phash", pa.uint64()),
        ("digest", pa.binary(16)),
        ("model", CONSTANT),
        ("prompt_hash", CONSTANT),
        ("sampling", CONSTANT),  # JSON
        ("seed", pa.int32()),  # of the caption's sampling
        ("seconds", pa.float32()),  # processing time of the shard, divided by its rows
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Screened:
    """A source item after screening; `image` is None if it was rejected."""

    item: Item
    digest: bytes  # of the item's data
    image: Image.Image | None = None
    statistics: ImageStatistics | None = None
    reason: str = ""
    detail: str = ""
    thumbnail: bytes | None = None


def check_source_values(item: Item, *, reads_text: bool) -> None:
    """Raise Rejected for an item whose label, or with `reads_text` its text, cannot be used.

    An item without words is of use for its label alone, to stage 1; without a label too it is of none.
    """
    if item.label_problem:
        raise screening.Rejected(screening.Reason.UNREADABLE_LABEL, item.label_problem)
    if reads_text and item.text_problem:
        raise screening.Rejected(screening.Reason.UNREADABLE_TEXT, item.text_problem)
    if reads_text and item.label < 0 and not item.text:
        raise screening.Rejected(screening.Reason.NO_WORDS)


def screen(item: Item, limits: ScreeningConfig, *, reads_text: bool = False) -> Screened:
    """Decode and screen one source item; with `reads_text`, its text is checked too."""
    image = statistics = None
    digest = screening.digest(item.data)
    try:
        if item.image_problem:
            raise screening.Rejected(screening.Reason.UNREADABLE, item.image_problem)
        image, size = screening.decode_downscaled(item.data, limits, lambda w, h: math.sqrt(MAX_PIXELS / (w * h)))
        statistics = screening.measure(image, size)
        screening.check_uniformity(statistics, limits)
        check_source_values(item, reads_text=reads_text)
    except screening.Rejected as rejected:
        return Screened(
            item=item,
            digest=digest,
            statistics=statistics,
            reason=rejected.reason,
            detail=rejected.detail,
            thumbnail=screening.thumbnail(image) if image else None,
        )
    return Screened(item=item, digest=digest, image=image, statistics=statistics)


def make_part(items: Iterable[Item], captioner: Captioner, limits: ScreeningConfig) -> pa.Table:
    """Screen and caption the items of one shard; background threads decode and screen ahead of the captioner."""
    start = time.monotonic()
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def screen_and_resize(item: Item) -> Screened:
        screened = screen(item, limits, reads_text=captioner.reads_source_text)
        return replace(screened, image=captioner.prepare(screened.image)) if screened.image else screened

    def accepted() -> Iterator[CaptionRequest]:
        for row, screened in enumerate(prefetch_map(screen_and_resize, items)):
            append_row(columns, screened)
            if screened.image:
                yield CaptionRequest(row=row, image=screened.image, item=screened.item, digest=screened.digest)

    for row, caption in captioner.stream(accepted()):
        set_caption(columns, row, caption)
    rows = len(columns["id"])
    for name in ("model", "prompt_hash", "sampling"):
        columns[name] = [getattr(captioner, name)] * rows
    columns["seconds"] = [(time.monotonic() - start) / max(1, rows)] * rows
    return pa.table(columns, schema=SCHEMA)


def content_digest(table: pa.Table) -> str:
    """Return the SHA-256 of a part without its processing time, so that equal content has equal digests."""
    return hashlib.sha256(repr(table.drop(["seconds"]).to_pydict()).encode()).hexdigest()


def append_row(columns: dict[str, list[Any]], screened: Screened) -> None:
    """Append the row of a screened item, without a caption, to the columns."""
    row = {
        "id": screened.item.id,
        "label": screened.item.label,
        "caption": "",
        "short_caption": "",
        "valid": screened.image is not None,
        "reason": screened.reason,
        "detail": screened.detail,
        "thumbnail": screened.thumbnail,
        "digest": screened.digest,
        **(asdict(screened.statistics) if screened.statistics else {}),
    }
    for name, values in columns.items():
        values.append(row.get(name))


def set_caption(columns: dict[str, list[Any]], row: int, caption: Caption) -> None:
    """Set the caption of a row. A caption with a problem makes the row invalid, and is kept for the audit."""
    columns["caption"][row] = caption.text
    columns["short_caption"][row] = caption.short
    columns["seed"][row] = caption.seed
    if caption.problem:
        columns["valid"][row] = False
        columns["reason"][row], columns["detail"][row] = f"caption: {caption.problem}", caption.text
