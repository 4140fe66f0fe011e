"""A caption part: one parquet file a shard, one line for each of the shard's source items, in their order."""

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from PIL import Image

from pixart.config.dataset import ScreeningConfig
from pixart.data.captions.captioner import MAX_PIXELS, Caption, Captioner, Given
from pixart.data.images import screening
from pixart.data.images.screening import Statistics
from pixart.data.prefetch import made_ahead
from pixart.data.sources.base import Item

WORD = pa.dictionary(pa.int32(), pa.string())  # the same in every row
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int32()),  # -1 where the source has none
        ("caption", pa.string()),
        ("short_caption", pa.string()),
        ("valid", pa.bool_()),
        ("reason", pa.string()),  # why not, of screening or of the caption; "" for a valid row
        ("detail", pa.string()),
        ("thumbnail", pa.binary()),  # JPEG, of a rejected row that could be decoded
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("brightness", pa.float32()),
        ("entropy", pa.float32()),
        ("dominant", pa.float32()),
        ("flat", pa.float32()),
        ("gradient", pa.float32()),
        ("phash", pa.uint64()),
        ("digest", pa.binary(16)),
        ("model", WORD),
        ("prompt_hash", WORD),
        ("sampling", WORD),  # JSON
        ("seed", pa.int32()),  # that the caption was sampled with
        ("seconds", pa.float32()),  # the shard's, shared by its rows
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Screened:
    """A source item after screening; without an image it is rejected."""

    item: Item
    digest: bytes  # of the item's data
    image: Image.Image | None = None
    statistics: Statistics | None = None
    reason: str = ""
    detail: str = ""
    thumbnail: bytes | None = None


def screen(item: Item, limits: ScreeningConfig) -> Screened:
    image = statistics = None
    digest = screening.digest(item.data)
    try:
        image, size = screening.decode_shrunk(item.data, limits, lambda w, h: math.sqrt(MAX_PIXELS / (w * h)))
        statistics = screening.measure(image, size)
        screening.check(statistics, limits)
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
    """Screens and captions all items; decoding and screening run ahead of the captioner, in threads."""
    begun = time.monotonic()
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}

    def ready(item: Item) -> Screened:
        screened = screen(item, limits)
        return replace(screened, image=captioner.prepare(screened.image)) if screened.image else screened

    def kept() -> Iterator[Given]:
        for row, screened in enumerate(made_ahead(ready, items)):
            append(columns, screened)
            if screened.image:
                yield Given(row=row, image=screened.image, item=screened.item, digest=screened.digest)

    for row, caption in captioner.stream(kept()):
        set_caption(columns, row, caption)
    rows = len(columns["id"])
    for name in ("model", "prompt_hash", "sampling"):
        columns[name] = [getattr(captioner, name)] * rows
    columns["seconds"] = [(time.monotonic() - begun) / max(1, rows)] * rows
    return pa.table(columns, schema=SCHEMA)


def content_digest(table: pa.Table) -> str:
    """SHA-256 of all that a part says but for how long it took: the same whenever it is made."""
    return hashlib.sha256(repr(table.drop(["seconds"]).to_pydict()).encode()).hexdigest()


def append(columns: dict[str, list[Any]], screened: Screened) -> None:
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
    """A caption that has a problem makes its row invalid, and is kept to be looked at."""
    columns["caption"][row] = caption.text
    columns["short_caption"][row] = caption.short
    columns["seed"][row] = caption.seed
    if caption.problem:
        columns["valid"][row] = False
        columns["reason"][row], columns["detail"][row] = f"caption: {caption.problem}", caption.text
