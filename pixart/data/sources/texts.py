"""Texts and labels as sources store them: bytes of unknown encoding, JSON, lists of captions, words instead of numbers.

Nothing here raises for damaged content: what cannot be read is described, so that one bad row stays one bad row.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from pixart.config.dataset import ColumnsConfig

CAPTION_NAMES = (
    "text",
    "caption",
    "captions",
    "long_caption",
    "blip2_caption",
    "blip_caption",
    "generated_caption",
    "sentences",
    "sentence",
    "description",
    "prompt",
    "alt_text",
    "raw",
    "TEXT",
)  # columns and JSON keys that hold captions, in the order in which they are tried
LABEL_NAMES = ("label", "labels", "class_label", "fine_label", "class_id", "class_index", "target", "cls", "class")
LABEL_MAX = 2**31
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def caption_names(columns: ColumnsConfig) -> Sequence[str]:
    """Return the columns or keys of captions, in the order in which they are tried."""
    return (columns.caption,) if columns.caption else CAPTION_NAMES


def label_names(columns: ColumnsConfig) -> Sequence[str]:
    """Return the columns or keys of labels, in the order in which they are tried."""
    return (columns.label,) if columns.label else LABEL_NAMES


def decode_text(data: bytes) -> str:
    """Decode a text in UTF-8, or UTF-16 with a byte order mark; bytes that are neither are replaced by U+FFFD."""
    return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig", "replace").strip()


def valid_unicode(text: str) -> str:
    """Return a text with its lone surrogates, which JSON can express and UTF-8 cannot, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()


def parse_json(data: bytes) -> tuple[dict[str, Any], str]:
    """Return a JSON object and "", or an empty one and what is wrong with it."""
    try:
        values = json.loads(decode_text(data))
    except (ValueError, RecursionError) as error:
        return {}, f"its JSON cannot be read: {error}"
    return (values, "") if isinstance(values, dict) else ({}, "its JSON is not an object")


def caption_of(value: Any, seed: int, row: int) -> tuple[str, str]:
    """Return the caption that a value holds and "", or "" and what is wrong with the value.

    Of a list one caption is chosen, always the same for one seed and row. A caption can be an object with one of
    CAPTION_NAMES, as those of COCO.
    """
    if value is None:
        return "", ""
    if isinstance(value, bytes):
        return decode_text(value), ""
    if isinstance(value, str):
        return valid_unicode(value), ""
    if isinstance(value, Mapping):
        return first_caption((value.get(name) for name in CAPTION_NAMES), seed, row)
    if isinstance(value, (list, tuple)):
        results = [caption_of(part, seed, row) for part in value]
        captions = [caption for caption, _ in results if caption]
        if not captions:
            return "", next((problem for _, problem in results if problem), "")
        return captions[int.from_bytes(sha256(f"{seed}:{row}".encode()).digest()[:8]) % len(captions)], ""
    return "", f"its caption is {type(value).__name__} {value!r:.40}, not a text"


def first_caption(values: Iterable[Any], seed: int, row: int) -> tuple[str, str]:
    """Return the first of several values that holds words, as `caption_of` does; else the first problem."""
    problem = ""
    for value in values:
        caption, wrong = caption_of(value, seed, row)
        if caption:
            return caption, ""
        problem = problem or wrong
    return "", problem


def label_of(value: Any) -> tuple[int, str]:
    """Return the class index that a value holds and "", or -1 and what is wrong with the value. None means no label."""
    if value is None:
        return -1, ""
    text = decode_text(value) if isinstance(value, bytes) else value
    try:
        if isinstance(text, (bool, float)) and int(text) != text:
            raise ValueError
        label = int(text)
    except (TypeError, ValueError, OverflowError):
        return -1, f"its label is {valid_unicode(str(text))!r:.60}, not an integer"
    return (label, "") if -1 <= label < LABEL_MAX else (-1, f"its label is {label}, out of range")
