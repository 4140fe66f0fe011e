"""Damaged tars, parquet files, sidecars and metadata: every row is accounted for, and none stops the others.

`python -m tests.attack.test_sources KIND` tries the inputs of one kind; see `tests.attack.mutations`.
"""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart.data.sources.base import Item
from pixart.data.sources.open import open_source
from tests.attack.mutations import attack_kind, number, outcomes_of
from tests.pixart.data.sources.test_sources import noise_image

ROWS = 4
IMAGES = [noise_image(row, side=8) for row in range(ROWS)]
CAPTIONS = [f"caption {row}, été" for row in range(ROWS)]
Kind = tuple[int, Callable[[], dict[str, bytes]], Callable[[Path, bytes], int | None]]


def tar_of(members: dict[str, bytes], **options: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()[: 512 * (4 * len(members) + 4)]


def tars() -> dict[str, bytes]:
    """Return intact tars of the formats ustar, GNU and pax."""
    members = {}
    for row in range(ROWS):
        members |= {f"{row}.jpg": IMAGES[row], f"{row}.txt": CAPTIONS[row].encode(), f"{row}.cls": str(row).encode()}
    long = {f"{'folder/' * 20}{name}": data for name, data in list(members.items())[:6]}
    record = {"0.jpg": IMAGES[0], "0.json": json.dumps({"caption": CAPTIONS, "label": 3}).encode()}
    return {
        "ustar": tar_of(members, format=tarfile.USTAR_FORMAT),
        "gnu": tar_of(long, format=tarfile.GNU_FORMAT),
        "pax": tar_of({**long, "é.jpg": IMAGES[0]}, format=tarfile.PAX_FORMAT),
        "json": tar_of(record),
    }


def parquets() -> dict[str, bytes]:
    """Return intact parquet files with images as structs and as bytes, compressed and with dictionaries."""
    structs = [{"bytes": data, "path": f"{row}.jpg"} for row, data in enumerate(IMAGES)]
    tables = {
        "struct": (pa.table({"image": structs, "text": CAPTIONS, "label": [0, 1, 2, 3]}), {"row_group_size": 2}),
        "binary": (pa.table({"jpg": IMAGES, "caption": [CAPTIONS] * ROWS}), {"compression": "zstd"}),
        "checked": (pa.table({"image": IMAGES, "class": ["a", "b", "a", "b"]}), {"write_page_checksum": True}),
    }
    files = {}
    for name, (table, options) in tables.items():
        pq.write_table(table, file := io.BytesIO(), **options)
        files[name] = file.getvalue()
    return files


def sidecars() -> dict[str, bytes]:
    record = {"caption": CAPTIONS[:2], "label": 3, "nested": {"a": [1, None, True]}}
    return {".txt": CAPTIONS[0].encode(), ".json": json.dumps(record).encode(), ".utf16": CAPTIONS[0].encode("utf-16")}


def metadata() -> dict[str, bytes]:
    rows = [{"file_name": f"{row}.jpg", "text": CAPTIONS[row], "label": row} for row in range(ROWS)]
    lines = "".join(f'{row["file_name"]},"{row["text"]}",{row["label"]}\n' for row in rows)
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return {
        "jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode(),
        "csv": f"file_name,text,label\n{lines}".encode(),
        "parquet": file.getvalue(),
    }


def write_images(folder: Path) -> None:
    for row in range(ROWS):
        (folder / f"{row}.jpg").write_bytes(IMAGES[row])


def put_file(end: str) -> Callable[[Path, bytes], None]:
    def put(folder: Path, data: bytes) -> None:
        (folder / f"0{end}").write_bytes(data)

    return put


def put_sidecar(folder: Path, data: bytes) -> int:
    """Write a damaged file beside the first image, in both suffixes, and return the number of rows that must come."""
    write_images(folder)
    (folder / "0.json").write_bytes(data)
    (folder / "0.txt").write_bytes(data)
    for row in range(1, ROWS):
        (folder / f"{row}.txt").write_text(CAPTIONS[row])
    return ROWS


def put_metadata(folder: Path, data: bytes) -> None:
    write_images(folder)
    end = "parquet" if data[:4] == b"PAR1" or data[-4:] == b"PAR1" else "csv" if data[:4] == b"file" else "jsonl"
    (folder / f"metadata.{end}").write_bytes(data)


KINDS: dict[str, Kind] = {
    "tars": (500, tars, put_file(".tar")),
    "parquet": (500, parquets, put_file(".parquet")),
    "sidecars": (250, sidecars, put_sidecar),
    "metadata": (250, metadata, put_metadata),
}


def attempt(put: Callable[[Path, bytes], int | None]) -> Callable[[bytes], str]:
    """Return a function that reads a source with a damaged file in it, and checks that every row is accounted for."""

    def read(data: bytes) -> str:
        with TemporaryDirectory() as folder:
            expected = put(Path(folder), data)  # rows, if they are known
            source = open_source(folder)
            contents = source.contents()
            items = list(source.read(0, len(source)))
            assert len(items) == len(source) == contents.items, (len(items), len(source), contents.items)
            assert expected is None or len(items) == expected, (len(items), expected)
            # A row of which another column is damaged has a label that counts, and is invalid.
            assert contents.labelled >= sum(item.label >= 0 for item in items)
            assert contents.largest_label >= max((item.label for item in items), default=-1)
            for item in items:
                check(item)
            if expected:
                assert [item.text for item in items[1:]] == CAPTIONS[1:]  # of the rows that are not damaged
            bad = sum(bool(item.image_problem or item.label_problem or item.text_problem) for item in items)
            return f"read: {len(items)} rows, {bad} with a problem, {sum(contents.left_out.values())} left out"

    return read


def check(item: Item) -> None:
    """Check that an item is one that can be stored: its texts are valid Unicode in one line each."""
    assert not item.image_problem or not item.data
    assert item.label == -1 if item.label_problem else item.label >= -1
    for text in (item.id, item.text, item.image_problem, item.label_problem, item.text_problem):
        text.encode()
    assert not item.text_problem or not item.text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_sources(kind):
    outcomes = outcomes_of("tests.attack.test_sources", kind)
    assert len(outcomes) == number(KINDS[kind][0])
    read = [outcome for outcome in outcomes if outcome["outcome"].startswith("read")]
    print(f"{kind}: {len(read)} read, {len(outcomes) - len(read)} refused")
    assert len(read) > len(outcomes) // 20
    if kind == "sidecars":
        assert len(read) == len(outcomes)  # a damaged sidecar never costs more than its row


def main() -> None:
    count, files, put = KINDS[sys.argv[1]]
    attack_kind(sys.argv[1], count, files, attempt(put))


if __name__ == "__main__":
    main()
