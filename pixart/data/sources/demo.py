"""An image source of rendered demo scenes."""

import io
from collections.abc import Iterator

from pixart.data.sources.base import Item
from pixart.data.sources.contents import Contents


class DemoSource:
    """Rendered scenes with their captions; each is a pure function of (seed, row)."""

    def __init__(self, num_images: int, seed: int, image_size: int):
        from pixart.demo.scenes import SHAPES

        self.class_names = list(SHAPES)
        self._num_images, self._seed, self._image_size = num_images, seed, image_size

    def __len__(self) -> int:
        return self._num_images

    def contents(self) -> Contents:
        items, largest = len(self), len(self.class_names) - 1
        return Contents(items=items, labelled=items, largest_label=largest, has_words=True)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        from PIL import Image

        from pixart.demo.scenes import caption, make_scene, render

        for index in range(start, min(stop, len(self))):
            scene = make_scene(self._seed, index)
            encoded = io.BytesIO()
            Image.fromarray(render(scene, self._image_size)).save(encoded, "PNG", compress_level=1)
            label = self.class_names.index(scene.shape)
            yield Item(id=f"{self._seed}:{index}", data=encoded.getvalue(), label=label, text=caption(scene))
