"""Image sources by URL: rows in a fixed order, any range of which is read without the rest.

The order is that of the sorted names, so that row r is the same item in every process, as long as no file is added.
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Protocol

from pixart.data.sources.file_index import ALLOWED, IMAGE_SUFFIXES, Files, find_files, suffix_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One row of a source."""

    id: str  # relative path, "file:row" or "tar:key": names the source's row for ever
    data: bytes  # the encoded image as stored
    label: int  # class index, -1 where the source has none
    text: str  # the source's own words, "" where it has none
    text_is_class: bool = False  # `text` is the name of the class, not a caption


class Source(Protocol):
    class_names: list[str]  # by label; empty where the source names no classes

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Rows start to stop - 1, as far as there are any."""
        ...


def open_source(
    url: str, *, images: int | None = None, seed: int = 0, image_size: int = 256, counts: Path | None = None
) -> Source:
    """Opens `demo` or the images at `url`: a folder, a file or a pattern such as `data/train-*.parquet`.

    `images` is how many rows to take at most, and for the demo, whose scenes of `seed` have `image_size` pixels
    a side, exactly. `counts` is a file that keeps how many rows each parquet or tar file has, so that only the
    first process that opens the source has to look into all of them.

    Raises ValueError for a source that does not exist, is empty or is of no kind that is known.
    """
    if images is not None and images < 1:
        raise ValueError(f"source {url!r}: images={images} must be at least 1")
    if url == "demo":
        if images is None:
            raise ValueError("source 'demo': images must say how many scenes it has, at least 1")
        return DemoSource(images, seed, image_size)
    files = find_files(url)
    kinds = sorted({kind for name in files.sizes if (kind := _kind(name))})
    if not kinds:
        raise ValueError(f"source {url!r}: has no images; {ALLOWED}")
    if len(kinds) > 1:
        raise ValueError(f"source {url!r}: mixes {' and '.join(kinds)} files, name one kind by a pattern; {ALLOWED}")
    if kinds == ["image"]:
        return FolderSource(files, images)
    if kinds == ["parquet"]:
        from pixart.data.sources.parquet import ParquetSource

        return ParquetSource(files.of(".parquet"), images, counts)
    from pixart.data.sources.webdataset import WebDatasetSource

    return WebDatasetSource(files.of(".tar"), images, counts)


def _kind(name: str) -> str | None:
    suffix = suffix_of(name)
    return "image" if suffix in IMAGE_SUFFIXES else suffix[1:] if suffix in (".parquet", ".tar") else None


def unicode(name: str) -> str:
    """A file's name as text; bytes of it that are none are written out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def class_text(name: str) -> str:
    """The name of a class as words."""
    return name.replace("_", " ")


class DemoSource:
    """Rendered scenes, each a function of (seed, row)."""

    def __init__(self, images: int, seed: int, image_size: int):
        from pixart.demo.scenes import SHAPES

        self.class_names = list(SHAPES)
        self._images, self._seed, self._image_size = images, seed, image_size

    def __len__(self) -> int:
        return self._images

    def read(self, start: int, stop: int) -> Iterator[Item]:
        from PIL import Image

        from pixart.demo.scenes import caption, make_scene, render

        for index in range(start, min(stop, len(self))):
            scene = make_scene(self._seed, index)
            encoded = io.BytesIO()
            Image.fromarray(render(scene, self._image_size)).save(encoded, "PNG", compress_level=1)
            label = self.class_names.index(scene.shape)
            yield Item(id=f"{self._seed}:{index}", data=encoded.getvalue(), label=label, text=caption(scene))


class FolderSource:
    """Image files, each of the class that its directory is named after; those of a flat folder have no class.

    The text is that of a .txt file beside the image, or else the name of the class.
    """

    at_once = 32  # files asked for together, which file systems across a network fetch concurrently

    def __init__(self, files: Files, images: int | None):
        self._files = files
        self._names = list(islice((name for name in files.sizes if suffix_of(name) in IMAGE_SUFFIXES), images))
        directories = {PurePosixPath(name).parent.name for name in files.sizes if suffix_of(name) in IMAGE_SUFFIXES}
        classes = [] if "" in directories else sorted(directories)
        self.class_names = [unicode(name) for name in classes]
        self._labels = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for first in range(start, min(stop, len(self)), self.at_once):
            names = self._names[first : min(first + self.at_once, stop)]
            sidecars = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in names}
            captions = [name for name in names if sidecars[name] in self._files.sizes]
            texts = dict(zip(captions, self._fetch([sidecars[name] for name in captions]), strict=True))
            for name, data in zip(names, self._fetch(names), strict=True):
                directory = PurePosixPath(name).parent.name
                label = self._labels.get(directory, -1)
                if name in texts:
                    text = texts[name].decode("utf-8", "replace").strip()
                    yield Item(id=unicode(name), data=data, label=label, text=text)
                else:
                    text = "" if label < 0 else class_text(unicode(directory))
                    yield Item(id=unicode(name), data=data, label=label, text=text, text_is_class=label >= 0)

    def _fetch(self, names: list[str]) -> list[bytes]:
        paths = [self._files.path(name) for name in names]
        return self._files.system.cat_ranges(paths, 0, None, on_error="raise")
