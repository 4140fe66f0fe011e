"""The items of a tar file in the layout of WebDataset, listed from its headers.

Members that share a name up to the first dot of their base name are one item. What follows that dot is the field, and
the last suffix of a field is its type, so that `0.image.jpg` and `0.jpg` are both an image of item `0`.
"""

import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pixart.data.sources.file_index import IMAGE_SUFFIXES, suffix_reason

TEXT_SUFFIXES = (".txt", ".text", ".caption")
KINDS = {
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
    ".cls": "label",
    ".json": "json",
}
Member = tuple[int, int]  # offset and size in bytes


@dataclass(kw_only=True, slots=True)
class TarIndex:
    """The items of a tar file in file order, as (key, members by kind), and counts of the members left out."""

    items: list[tuple[str, dict[str, Member]]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def scan_tar(file: Any) -> TarIndex:
    """Read the headers of a tar file.

    Raises tarfile.ReadError if it is cut, damaged, or has a member of negative size.
    """
    index, fields = TarIndex(), _Fields()
    for member in _members(file):
        name = member.name.removeprefix("./")
        if member.isdir():
            continue
        if member.islnk():
            place = fields.places.get(member.linkname.removeprefix("./"))
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
        fields.places[name] = place
        directory, slash, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        suffix = f".{extension.rpartition('.')[2].lower()}"
        if not stem:
            index.left_out["hidden file"] += 1
        elif suffix not in KINDS:
            index.left_out[suffix_reason(base)] += 1
        else:
            fields.add(directory + slash + stem, KINDS[suffix], extension.lower(), place)
    for key, members in fields.by_key.items():
        if "image" in members:
            index.items.append((key, {kind: _preferred(named) for kind, named in members.items()}))
            if others := len(members["image"]) - 1:
                index.left_out["further image of the same key"] += others
        else:
            index.left_out["no image of this key"] += 1
    return index


class _Fields:
    """The fields of the items of a tar file, and the place of every member by its name."""

    def __init__(self) -> None:
        self.by_key: dict[str, dict[str, dict[str, Member]]] = {}  # key, kind, field
        self.places: dict[str, Member] = {}

    def add(self, key: str, kind: str, name: str, place: Member) -> None:
        self.by_key.setdefault(key, {}).setdefault(kind, {})[name] = place


def _preferred(fields: dict[str, Member]) -> Member:
    """Return the field that is its type alone, such as `jpg`, or is named after its kind, or comes first."""

    def rank(name: str) -> int:
        first, _, rest = name.partition(".")
        return 0 if not rest else 1 if first in ("image", "img", "text", "caption", "label") else 2

    return fields[min(fields, key=rank)]


def _members(file: Any) -> Iterator[tarfile.TarInfo]:
    """Yield the members of all archives in a file, which `cat` may have joined."""
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
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive block")  # tarfile accepts a cut between members
        begin = _next_content(file, tar.offset + tarfile.BLOCKSIZE)
        if begin < 0:
            return


def _next_content(file: Any, begin: int) -> int:
    """Return the offset of the next block that is not zero; -1 at the end of the file."""
    while chunk := file.read(64 * tarfile.BLOCKSIZE):
        if rest := chunk.lstrip(b"\0"):
            return begin + (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        begin += len(chunk)
    return -1
