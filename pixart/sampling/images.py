"""Pictures as they are asked for and made: one PNG each, with all its settings in the file's text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pixart.sampling.pipeline import PixArtPipeline

BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture of a prompt (stage 2) or of a class (stage 1), from noise of its own seed."""

    seed: int
    prompt: str = ""
    request: str = ""  # what the prompt was rewritten from; "" where it was not
    label: int | None = None  # index of the class, in stage 1
    class_name: str = ""

    @property
    def caption(self) -> str:
        """What is written under it."""
        if self.label is not None:
            return self.class_name
        return f"asked: {self.request}\n{self.prompt}" if self.request else self.prompt

    def settings(self) -> dict[str, str]:
        """Its own, which no other picture of the sheet need have."""
        if self.label is not None:
            return {"class": self.class_name, "class_index": str(self.label), "seed": str(self.seed)}
        request = {"request": self.request} if self.request else {}
        return {"prompt": self.prompt, **request, "seed": str(self.seed)}


def make(
    pipeline: PixArtPipeline, pictures: Sequence[Picture], *, steps: int, guidance: float
) -> Iterator[Image.Image]:
    """The pictures in their order, made in batches that they do not depend on."""
    for begin in range(0, len(pictures), BATCH):
        chunk = pictures[begin : begin + BATCH]
        labels = [picture.label for picture in chunk if picture.label is not None]
        yield from pipeline(
            None if labels else [picture.prompt for picture in chunk],
            class_labels=labels or None,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(picture.seed) for picture in chunk],
        ).images


def save_png(image: Image.Image, path: Path, settings: Mapping[str, str]) -> None:
    """The settings become the file's text chunks, by their names."""
    text = PngInfo()
    for name, value in settings.items():
        text.add_text(name, value)
    image.save(path, pnginfo=text)
