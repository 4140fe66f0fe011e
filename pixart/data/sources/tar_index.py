"""The items of a tar file in the layout of WebDataset, listed from its headers.

Members that share a name up to the first dot of their base name are one item, unless a field comes a second time: that
begins another item, as in archives that were joined. What follows the dot is the field, and the last suffix of a field
is its type, so that `0.image.jpg` and `0.jpg` are both an image of item `0`.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.file_list import IMAGE_SUFFIXES, suffix_reason

TEXT_SUFFIXES = (".txt", ".text", ".caption", ".transcript")
KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    **dict.fromkeys((".cls", ".class", ".index"), "label"),
    **dict.fromkeys((".json", ".jsn"), "json"),
}
NAMED = ("image", "img", "text", "caption", "label")  # fields that are named after their kind
MAX_HEADER = 1 << 18  # bytes of a header of names and attributes
MAX_DIGITS = re.compile(rb"[0-9]{512}")  # more in a row make tarfile's search for a name take quadratic time
CHUNK = 64 * tarfile.BLOCKSIZE
USTAR = slice(257, 262)  # of a header: the magic word of the format
Member = tuple[int, int]  # offset and size in bytes


@dataclass(kw_only=True, slots=True)
class TarIndex:
    """The items of a tar file in file order, as (key, members by kind), and counts of the members left out."""

    items: list[tuple[str, dict[str, Member]]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Fields:
    """The fields of one item by kind and name."""

    key: str
    by_kind: dict[str, dict[str, Member]] = field(default_factory=dict)


def scan_tar(file: Any, columns: ColumnsConfig | None = None) -> TarIndex:
    """Read the headers of a tar file. `columns` may name fields, such as `jpg` or `target.jpg`.

    A damaged header is counted, and the next one searched for. Raises tarfile.ReadError if the file is cut, has no
    header that is whole, or has a member of negative size.
    """
    index = TarIndex()
    items: list[_Fields] = []
    current: dict[str, _Fields] = {}  # the last item of each key of this archive
    places: dict[str, Member] = {}
    for member in _members(_Headers(file), index.left_out):
        if member is None:  # another archive begins
            current.clear()
            continue
        name = member.name.removeprefix("./")
        if member.isdir():
            continue
        if member.islnk():
            place = places.get(member.linkname.removeprefix("./"))
            if place is None:
                index.left_out["hard link to a member that is not before it"] += 1
                continue
        elif member.issym():
            index.left_out["symbolic link"] += 1
            continue
        elif not member.isfile() or member.issparse():
            index.left_out["neither a plain file nor a link"] += 1
            continue
        else:
            place = (member.offset_data, member.size)
        places[name] = place
        directory, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        suffix = f".{extension.rpartition('.')[2].lower()}"
        if not stem:
            index.left_out["hidden file"] += 1
        elif suffix not in KINDS:
            index.left_out[suffix_reason(base)] += 1
        else:
            key, kind, name = directory + slash + stem, KINDS[suffix], extension.lower()
            item = current.get(key)
            if item is None or name in item.by_kind.get(kind, ()):
                item = current[key] = _Fields(key)
                items.append(item)
            item.by_kind.setdefault(kind, {})[name] = place
    keys: Counter[str] = Counter()
    for item in items:
        keys[item.key] += 1
        members = _chosen(item.by_kind, columns or ColumnsConfig())
        if "image" in members:
            number = keys[item.key]
            index.items.append((item.key if number == 1 else f"{item.key}#{number}", members))
            if others := len(item.by_kind["image"]) - 1:
                index.left_out["further image of the same key"] += others
        else:
            index.left_out["no image of this key"] += 1
    return index


def _chosen(by_kind: dict[str, dict[str, Member]], columns: ColumnsConfig) -> dict[str, Member]:
    """Return one member of each kind: the field that the configuration names, or else the preferred one."""
    members = {}
    wanted = {"image": columns.image, "text": columns.caption, "label": columns.label}
    for kind, named in by_kind.items():
        name = (wanted.get(kind) or "").lower()
        if name in named:
            members[kind] = named[name]
        elif not name or kind not in ("image", "label"):  # a caption may be a key of the JSON
            members[kind] = _preferred(named)
    label = (columns.label or "").lower()
    if label in by_kind.get("text", {}):
        members["label"] = by_kind["text"][label]
    return members


def _preferred(fields: dict[str, Member]) -> Member:
    """Return the field that is its type alone, such as `jpg`, or is named after its kind, or comes first."""

    def rank(name: str) -> int:
        first, _, rest = name.partition(".")
        return 0 if not rest else 1 if first in NAMED else 2

    return fields[min(fields, key=rank)]


class _Headers:
    """File of which `tarfile` reads headers alone. Raises tarfile.ReadError for headers that no archive has."""

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.close = file, file.seek, file.close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header has {size} bytes")
        data = self._file.read(size)
        if size > tarfile.BLOCKSIZE and MAX_DIGITS.search(data):
            raise tarfile.ReadError("a header has a number of more than 512 digits")
        return data


def _members(file: Any, left_out: Counter[str]) -> Iterator[tarfile.TarInfo | None]:
    """Yield the members of all archives in a file, which `cat` may have joined, and None between archives."""
    begin = 0
    while True:
        file.seek(begin)
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closing it would close nothing
        if begin and next(iter(tar), None) is None:
            return  # bytes behind the end of an archive that are not another one
        for member in tar:
            if member.size < 0:
                raise tarfile.ReadError(f"a member has the size {member.size}")
            yield member
            tar.members.clear()  # type: ignore[attr-defined]  # or they would all be kept
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            yield None
            begin = _next_content(file, tar.offset + tarfile.BLOCKSIZE)
        else:
            begin = _next_header(file, tar.offset + tarfile.BLOCKSIZE) if len(block) == tarfile.BLOCKSIZE else -1
            if begin < 0:  # tarfile accepts a cut between members
                raise tarfile.ReadError("no end-of-archive block")
            left_out["damaged header of a member"] += 1
        if begin < 0:
            return


def _next_content(file: Any, begin: int) -> int:
    """Return the offset of the next block that is not zero; -1 at the end of the file."""
    while chunk := file.read(CHUNK):
        if rest := chunk.lstrip(b"\0"):
            return begin + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        begin += len(chunk)
    return -1


def _next_header(file: Any, begin: int) -> int:
    """Return the offset of the next block that is a whole header, or -1."""
    while chunk := file.read(CHUNK):
        for offset in range(0, len(chunk) - tarfile.BLOCKSIZE + 1, tarfile.BLOCKSIZE):
            block = chunk[offset : offset + tarfile.BLOCKSIZE]
            if block[USTAR] == b"ustar" and _is_header(block):
                return begin + offset
        begin += len(chunk)
    return -1


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
