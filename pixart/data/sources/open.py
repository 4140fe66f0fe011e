"""Opening of image sources by URL."""

from collections import Counter
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, BinaryIO

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.blocks import Reader, Writer, open_reader
from pixart.data.listing.file_list import ALLOWED, IMAGE_SUFFIXES, FileList, suffix_of, suffix_reason
from pixart.data.listing.folder_table import JSON_SIDECARS, TEXT_SIDECARS, FolderTable
from pixart.data.listing.recognition import is_unknown, recognized
from pixart.data.listing.walk import Place, find_place
from pixart.data.sources.base import Source
from pixart.data.sources.columns import image_storage
from pixart.data.sources.demo import DemoSource
from pixart.data.sources.folder import FolderSource
from pixart.data.sources.folder_index import Folders, write_index
from pixart.data.sources.metadata import NAMES as METADATA
from pixart.data.sources.parquet import ParquetSource
from pixart.data.sources.webdataset import WebDatasetSource

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_source(
    url: str,
    *,
    max_images: int | None = None,
    seed: int = 0,
    image_size: int = 256,
    counts_file: Path | None = None,
    listing_file: Path | None = None,
    columns: ColumnsConfig | None = None,
) -> Source:
    """Open `demo` or the images at `url`: a folder, a file or a pattern such as `data/train-*.parquet`.

    `max_images` limits the number of rows; the demo has exactly this number of scenes, rendered from `seed` with
    `image_size` pixels per side. Other sources choose one caption of several by `seed`. `listing_file` stores the
    files, so that only the first process that opens the source lists it, and `counts_file` the number of rows of each
    parquet or tar file, so that no other has to open all of them. `columns` names columns where no common name does.

    Raises ValueError if the source does not exist, is empty or is of an unknown kind.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"source {url!r}: the number of images is {max_images}; it must be at least 1")
    if url == "demo":
        if max_images is None:
            raise ValueError("source 'demo': the number of images is not set; it must be at least 1")
        return DemoSource(max_images, seed, image_size)
    place, columns = find_place(url), columns or ColumnsConfig()
    if listing_file is None:
        reader = list_source(place, TemporaryFile(), "its listing", columns, max_images)  # noqa: SIM115 - the reader's
    else:
        if not listing_file.exists():
            with listing_file.open("w+b") as file:
                list_source(place, file, f"{listing_file}", columns, max_images)
        reader = open_reader(listing_file)
    kind = reader.header["kind"]
    sizes = {} if kind == "image" else dict(reader.read(0, reader.rows))
    left_out = Counter(reader.header["left_out"])
    files = FileList(url=url, system=place.system, root=place.root, sizes=sizes, left_out=left_out)
    if kind == "image":
        return FolderSource(files, reader, seed, columns)
    source = ParquetSource if kind == "parquet" else WebDatasetSource
    return source(files, max_images, counts_file, seed, columns)


def list_source(place: Place, file: BinaryIO, name: str, columns: ColumnsConfig, max_images: int | None) -> Reader:
    """List the files at a place into a file of blocks, which holds its items if they are images, and return a reader.

    Raises ValueError if there are no images, or files of several kinds.
    """
    with TemporaryDirectory() as folder:
        table = FolderTable(Path(folder))
        try:
            listed = Listed(place, table)
            kind = listed.kind(columns)
            writer, header = Writer(file), dict[str, Any](kind=kind)
            files = listed.files(kind)
            if kind == "image":
                class_names, contents = write_index(
                    files, table, listed.folders, listed.metadata, writer, columns=columns, max_images=max_images
                )
                header |= {"class_names": class_names, "contents": contents.record(), "left_out": contents.left_out}
            else:
                for entry in files.sizes.items():
                    writer.add(entry)
                header |= {"left_out": files.left_out + table.left_out()}
            writer.finish(header)
        finally:
            table.close()
    return Reader(file, name)


class Listed:
    """The files at a place by kind; images and the files beside them are in `table`."""

    def __init__(self, place: Place, table: FolderTable) -> None:
        self.folders = Folders()
        self.metadata: list[str] = []
        self._place, self._table = place, table
        self._sizes: dict[str, dict[str, int]] = {"parquet": {}, "tar": {}}
        self._others: Counter[str] = Counter()
        self._compressed = ""  # a compressed tar
        unknown: list[tuple[str, int]] = []
        for name, size in place.files():
            if is_unknown(name, size):
                unknown.append((name, size))
                if len(unknown) == 1024:
                    self._recognize(unknown)
            else:
                self._add(name, size, is_image=suffix_of(name) in IMAGE_SUFFIXES)
        self._recognize(unknown)
        table.index_files()
        self.metadata.sort()
        self.num_images = table.count_images()
        if not any((self.num_images, *self._sizes.values(), self._others, place.left_out, self.metadata)):
            raise ValueError(f"source {place.url!r}: does not exist or is empty; {ALLOWED}")

    def kind(self, columns: ColumnsConfig) -> str:
        """Return what the source is made of: `image`, `parquet` or `tar`. Raises ValueError if that is not clear."""
        kinds = {"image"} if self.num_images else set()
        kinds |= {kind for kind, sizes in self._sizes.items() if sizes}
        if (
            not self.num_images
            and not kinds
            and (tables := [name for name in self.metadata if name.endswith(".parquet")])
        ):
            self._sizes["parquet"] = dict.fromkeys(tables, -1)
            kinds = {"parquet"}
        if "parquet" in kinds and len(kinds) > 1:
            storage = image_storage(self.files("parquet"), columns)
            if storage is None:  # such as the table that img2dataset writes beside its images
                kinds.remove("parquet")
            elif storage == "path":
                kinds.discard("image")  # they are the files that the rows name
        url = self._place.url
        if not kinds and self._compressed:
            raise ValueError(
                f"source {url!r}: {self._compressed} is a compressed tar file; decompress it, and all others"
            )
        if not kinds:
            raise ValueError(f"source {url!r}: contains no images; {ALLOWED}")
        if len(kinds) > 1:
            raise ValueError(
                f"source {url!r}: contains {' and '.join(sorted(kinds))} files; select one kind by a pattern"
            )
        return kinds.pop()

    def files(self, kind: str) -> FileList:
        """Return the files of a kind, except images, and the number of all others by reason."""
        left_out = self._place.left_out + self._others
        for other, sizes in self._sizes.items():
            if other != kind and sizes:
                left_out[f"suffix .{other}"] += len(sizes)
        place = self._place
        sizes = dict(sorted(self._sizes.get(kind, {}).items()))
        return FileList(url=place.url, system=place.system, root=place.root, sizes=sizes, left_out=left_out)

    def _add(self, name: str, size: int, *, is_image: bool) -> None:
        suffix = suffix_of(name)
        self.folders.add_other(name)
        if is_image:
            self._table.add_image(name, size)
            self.folders.add_image(name)
        elif PurePosixPath(name).name in METADATA:
            self.metadata.append(name)
        elif suffix in (*TEXT_SIDECARS, *JSON_SIDECARS):
            self._table.add_sidecar(name, size)
        elif suffix in (".parquet", ".tar"):
            self._sizes[suffix[1:]][name] = size
        else:
            self._others[suffix_reason(name)] += 1
            if name.lower().endswith(COMPRESSED_TARS):
                self._compressed = name

    def _recognize(self, files: list[tuple[str, int]]) -> None:
        for name, size, is_image in recognized(self._place.system, self._place.root, files):
            self._add(name, size, is_image=is_image)
        files.clear()
