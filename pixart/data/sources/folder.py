"""An image source of files in a folder, with subfolders as classes."""

from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath

from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.file_index import IMAGE_SUFFIXES, FileList, suffix_of


class FolderSource:
    """Image files whose class is the name of their directory; files of a flat folder have no class.

    The text of an item is the content of a .txt file of the same name, or else the name of its class.
    """

    batch_size = 32  # files requested together, which remote file systems fetch concurrently

    def __init__(self, files: FileList, max_images: int | None):
        self._files = files
        self._names = list(islice((name for name in files.sizes if suffix_of(name) in IMAGE_SUFFIXES), max_images))
        directories = {PurePosixPath(name).parent.name for name in files.sizes if suffix_of(name) in IMAGE_SUFFIXES}
        classes = [] if "" in directories else sorted(directories)
        self.class_names = [printable_name(name) for name in classes]
        self._labels = {name: label for label, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for first in range(start, min(stop, len(self)), self.batch_size):
            names = self._names[first : min(first + self.batch_size, stop)]
            sidecars = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in names}
            captions = [name for name in names if sidecars[name] in self._files.sizes]
            texts = dict(zip(captions, self._fetch([sidecars[name] for name in captions]), strict=True))
            for name, data in zip(names, self._fetch(names), strict=True):
                directory = PurePosixPath(name).parent.name
                label = self._labels.get(directory, -1)
                if name in texts:
                    text = texts[name].decode("utf-8", "replace").strip()
                    yield Item(id=printable_name(name), data=data, label=label, text=text)
                else:
                    text = "" if label < 0 else class_phrase(printable_name(directory))
                    yield Item(id=printable_name(name), data=data, label=label, text=text, text_is_class=label >= 0)

    def _fetch(self, names: list[str]) -> list[bytes]:
        paths = [self._files.path(name) for name in names]
        return self._files.system.cat_ranges(paths, 0, None, on_error="raise")
