"""Images in a folder, each of the class that its directory is named after."""

from collections.abc import Iterator
from itertools import islice
from pathlib import PurePosixPath

from pixart.data.sources.base import Item, class_text, unicode
from pixart.data.sources.file_index import IMAGE_SUFFIXES, Files, suffix_of


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
