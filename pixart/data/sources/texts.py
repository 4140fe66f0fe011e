"""Texts and labels as sources store them: bytes of unknown encoding, JSON, lists of captions, words instead of numbers.

Nothing here raises for damaged content: what cannot be read is described, so that one bad row stays one bad row.
"""

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from hashlib import sha256
from typing import Any

from pixart.config.dataset import ColumnsConfig

# Columns and JSON keys that hold captions, in the order in which they are tried; letters of either case are the same.
CAPTION_NAMES = (
    *("text", "caption", "captions", "long_caption", "blip2_caption", "blip_caption", "vlm_caption", "llava_caption"),
    *(
        "re_caption",
        "recaption",
        "generated_caption",
        "image_caption",
        "sentences",
        "sentence",
        "description",
        "prompt",
    ),
    *("alt_text", "alt", "raw", "txt", "texts", "conversations", "messages", "title", "json"),
)
LABEL_NAMES = (
    *("label", "labels", "class_label", "fine_label", "label_id", "class_id", "class_index", "class_idx", "target"),
    *("cls", "class", "category_id"),
)
SPEAKERS = ("from", "role")  # keys of a message that say whose it is
ANSWERING = ("gpt", "assistant", "model")  # whose messages are captions
LABEL_MAX = 2**31
MAX_CAPTION = 1 << 16  # characters; a longer text is no caption
MAX_DEPTH = 8  # of lists and objects that a caption is in
LANGUAGE = re.compile(r"[A-Za-z]{2,3}([-_][A-Za-z]{2,4}){0,2}")  # codes such as en, deu and zh-Hans-CN
INTEGER = re.compile(r"\s*([+-]?\d{1,18})(?:\.0*)?\s*")
# Byte order marks, of which that of UTF-16 begins that of UTF-32.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def caption_names(columns: ColumnsConfig) -> Sequence[str]:
    """Return the columns or keys of captions, in the order in which they are tried."""
    return (columns.caption,) if columns.caption else CAPTION_NAMES


def label_names(columns: ColumnsConfig) -> Sequence[str]:
    """Return the columns or keys of labels, in the order in which they are tried."""
    return (columns.label,) if columns.label else LABEL_NAMES


def pick(values: Mapping[str, Any], names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of `names`, in their order; a key of other letter cases stands for a missing one."""
    folded: dict[str, str] | None = None
    for name in names:
        if name in values:
            yield name, values[name]
            continue
        if folded is None:
            folded = {key.lower(): key for key in values if isinstance(key, str) and not key.islower()}
        if key := folded.get(name.lower()):
            yield key, values[key]


def encoding_of(head: bytes) -> str:
    """Return the encoding of a text by its first bytes: UTF-16 or UTF-32 by a mark or by zeros, or else UTF-8."""
    for mark, encoding in ENCODINGS.items():
        if head.startswith(mark):
            return encoding
    zeros = [head[place : 64 + place : 2].count(0) for place in (0, 1)]  # every other byte of mostly Latin letters
    if max(zeros) > len(head[:64]) // 4 and min(zeros) == 0:
        return "utf-16-be" if zeros[0] else "utf-16-le"
    return "utf-8-sig"


def decode_text(data: bytes) -> str:
    """Decode a text in UTF-8, UTF-16 or UTF-32; bytes that are none of these are replaced by U+FFFD."""
    return data.decode(encoding_of(data), "replace").strip()


def as_text(value: Any) -> str:
    """Return a value as text."""
    return decode_text(value) if isinstance(value, bytes) else str(value).strip()


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


def caption_of(value: Any, seed: int, row: int, depth: int = 0) -> tuple[str, str]:
    """Return the caption that a value holds and "", or "" and what is wrong with the value.

    Of a list one caption is chosen, always the same for one seed and row. A caption can be an object with one of
    CAPTION_NAMES, as those of COCO, or one by languages, and a list can be a conversation, of which the answers are
    captions.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "", ""
    if isinstance(value, bytes | str):
        text = decode_text(value) if isinstance(value, bytes) else valid_unicode(value)
        if len(text) > MAX_CAPTION:
            return "", f"its caption has {len(text)} characters; the limit is {MAX_CAPTION}"
        return text, ""
    if depth > MAX_DEPTH:
        return "", "its caption is nested too deeply"
    if isinstance(value, Mapping):
        if speaker := next((as_text(value[key]) for key in SPEAKERS if key in value), ""):
            words = value.get("value", value.get("content"))
            return caption_of(words, seed, row, depth + 1) if speaker.lower() in ANSWERING else ("", "")
        caption, problem = first_caption(pick(value, CAPTION_NAMES), seed, row, depth + 1)
        if caption or problem:
            return caption, problem
        return caption_by_language(value, seed, row, depth + 1)
    if isinstance(value, (list, tuple)):
        results = [caption_of(part, seed, row, depth + 1) for part in value]
        captions = [caption for caption, _ in results if caption]
        if not captions:
            return "", next((problem for _, problem in results if problem), "")
        return captions[int.from_bytes(sha256(f"{seed}:{row}".encode()).digest()[:8]) % len(captions)], ""
    return "", f"its caption is {type(value).__name__} {value!r:.40}, not a text"


def caption_by_language(values: Mapping[Any, Any], seed: int, row: int, depth: int) -> tuple[str, str]:
    """Return the caption of an object by languages, such as {"en": ..., "de": ...}, in English if it is there.

    Datasets also writes {"language": [...], "translation": [...]}. An object of other keys has no caption, which is a
    problem unless all of its values are empty.
    """
    names, texts = values.get("language"), values.get("translation")
    if isinstance(names, list | tuple) and isinstance(texts, list | tuple):
        values = {as_text(name): text for name, text in zip(names, texts, strict=False)}
    given = {as_text(name): value for name, value in values.items() if value not in (None, "", b"", [], {})}
    if not given:
        return "", ""
    if not all(LANGUAGE.fullmatch(name) for name in given):
        listed = ", ".join(valid_unicode(name) for name in list(given)[:5])
        return "", f"its caption is an object with the keys {listed:.80}, of which none is a caption"
    english = [value for name, value in given.items() if name.lower()[:2] == "en" and len(name) != 3]
    return caption_of(english or list(given.values()), seed, row, depth)


def first_caption(values: Iterable[tuple[str, Any]], seed: int, row: int, depth: int = 0) -> tuple[str, str]:
    """Return the first of several named values that holds words, as `caption_of` does; else the first problem."""
    problem = ""
    for _, value in values:
        caption, wrong = caption_of(value, seed, row, depth)
        if caption:
            return caption, ""
        problem = problem or wrong
    return "", problem


def label_of(value: Any) -> tuple[int, str]:
    """Return the class index that a value holds and "", or -1 and what is wrong with the value. None means no label."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return -1, ""
    text = as_text(value)
    match = INTEGER.fullmatch(text) if isinstance(value, str | bytes | float | Decimal) else None
    if isinstance(value, int) or match:
        label = int(match[1]) if match else int(value)
        return (label, "") if -1 <= label < LABEL_MAX else (-1, f"its label is {label}, out of range")
    return -1, f"its label is {valid_unicode(text)!r:.60}, not an integer"
