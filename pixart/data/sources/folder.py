"""An image source of files in a folder, with subfolders as classes."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from pixart.config.dataset import ColumnsConfig
from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.contents import Contents
from pixart.data.sources.file_index import SPLITS, FileList, suffix_reason
from pixart.data.sources.metadata import read_metadata
from pixart.data.sources.texts import caption_names, decode_text, first_caption, parse_json

SIDECARS = (".txt", ".json")
SHARD_FOLDER = re.compile(r"\d{5,}")  # as img2dataset names its folders


class FolderSource:
    """Image files whose class is the name of their directory.

    Images beside the class folders have no class, nor have those in a folder of a split (`train`) or of a shard
    (`00000`), nor those of a folder with metadata files, which name the classes themselves. The text of an item is its
    caption in the metadata, or a .txt or .json file of the same name, or else the name of its class. One caption of
    several is chosen by `seed`.
    """

    batch_size = 32  # files requested together, which remote file systems fetch concurrently

    def __init__(
        self,
        files: FileList,
        images: list[str],
        max_images: int | None,
        seed: int = 0,
        columns: ColumnsConfig | None = None,
    ):
        self._files, self._seed = files, seed
        self._columns = columns or ColumnsConfig()
        self._metadata = read_metadata(files, images, self._columns)
        self._all_images = images
        self._names = images[:max_images]
        if self._metadata.files:
            self._labels = self._metadata.labels
            self.class_names = [printable_name(name) for name in self._metadata.class_names]
        else:
            folders = {name: self._class_folder(name) for name in images}
            classes = sorted(set(folders.values()) - {""})
            self.class_names = [printable_name(name) for name in classes]
            indices = {name: label for label, name in enumerate(classes)}
            self._labels = {name: indices[folder] for name, folder in folders.items() if folder}

    def __len__(self) -> int:
        return len(self._names)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for first in range(start, min(stop, len(self)), self.batch_size):
            names = self._names[first : min(first + self.batch_size, stop)]
            sidecars = [path for name in names if not self._metadata.rows.get(name) for path in self._sidecars(name)]
            contents = dict(zip(sidecars, self._fetch(sidecars), strict=True))
            for row, (name, data) in enumerate(zip(names, self._fetch(names), strict=True), first):
                text, problem = self._caption(name, contents, row)
                label = self._labels.get(name, -1)
                text_is_class = not text and not problem and 0 <= label < len(self.class_names)
                yield Item(
                    id=printable_name(name),
                    data=data,
                    label=label,
                    text=class_phrase(self.class_names[label]) if text_is_class else text,
                    text_is_class=text_is_class,
                    text_problem=problem,
                )

    def contents(self) -> Contents:
        """Count what the folder holds and what is left out of it. Reads texts up to the first words."""
        labels = [self._labels[name] for name in self._names if name in self._labels]
        used = {path for name in self._all_images for path in (name, *self._sidecars(name))} | set(self._metadata.files)
        others = Counter(suffix_reason(name) for name in self._files.sizes if name not in used)
        return Contents(
            items=len(self),
            labelled=len(labels),
            left_out=self._files.left_out + self._metadata.left_out + others,
            largest_label=max(labels, default=-1),
            has_words=bool(labels and self.class_names) or any(self._has_words(name) for name in self._names),
        )

    def _has_words(self, name: str) -> bool:
        sidecars = self._sidecars(name)
        return bool(self._caption(name, dict(zip(sidecars, self._fetch(sidecars), strict=True)), 0)[0])

    def _class_folder(self, name: str) -> str:
        """Return the name of the folder that is the class of an image, "" if it has none."""
        parent = PurePosixPath(name).parent
        is_split = parent.name.lower() in SPLITS and len(parent.parts) == 1
        described = any(f"{parent}{end}" in self._files.sizes for end in (".parquet", "_stats.json"))
        numbered = SHARD_FOLDER.fullmatch(parent.name) and _with_suffix(name, ".json") in self._files.sizes
        return "" if is_split or described or numbered else parent.name

    def _sidecars(self, name: str) -> list[str]:
        return [path for suffix in SIDECARS if (path := _with_suffix(name, suffix)) in self._files.sizes]

    def _caption(self, name: str, sidecars: dict[str, bytes], row: int) -> tuple[str, str]:
        """Return the caption of an image and "", or "" and what is wrong with it."""
        if values := self._metadata.rows.get(name):
            return first_caption((values.get(key) for key in caption_names(self._columns)), self._seed, row)
        if text := decode_text(sidecars.get(_with_suffix(name, ".txt"), b"")):
            return text, ""
        if (path := _with_suffix(name, ".json")) not in sidecars:
            return "", ""
        values, problem = parse_json(sidecars[path])
        if problem:
            return "", problem
        return first_caption((values.get(key) for key in caption_names(self._columns)), self._seed, row)

    def _fetch(self, names: list[str]) -> list[bytes]:
        if not names:
            return []
        return self._files.system.cat_ranges([self._files.path(name) for name in names], 0, None, on_error="raise")


def _with_suffix(name: str, suffix: str) -> str:
    return str(PurePosixPath(name).with_suffix(suffix))
