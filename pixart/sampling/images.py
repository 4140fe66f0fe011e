"""Image generation from a list of requests."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pixart.sampling.pipeline import Conditioning, PixArtPipeline

BATCH_SIZE = 16
FRAME_MS, LAST_FRAME_MS = 80, 1500  # display time of the frames of a GIF, in milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """A request for one image of a prompt (stage 2) or of a class (stage 1)."""

    seed: int  # of the initial noise
    prompt: str = ""
    request: str = ""  # the user's request if the prompt was rewritten, else ""
    label: int | None = None  # index of the class, in stage 1
    class_name: str = ""

    @property
    def caption(self) -> str:
        """The text below the image on a contact sheet."""
        if self.label is not None:
            return self.class_name
        return f"request: {self.request}\n{self.prompt}" if self.request else self.prompt

    def settings(self) -> dict[str, str]:
        """Return the settings that identify this image among those of one run."""
        if self.label is not None:
            return {"class": self.class_name, "class_index": str(self.label), "seed": str(self.seed)}
        request = {"request": self.request} if self.request else {}
        return {"prompt": self.prompt, **request, "seed": str(self.seed)}


def generate(
    pipeline: PixArtPipeline,
    requests: Sequence[SampleRequest],
    *,
    steps: int,
    guidance: float,
    on_frame: Callable[[int, int, Image.Image], None] | None = None,
    shapes: Sequence[tuple[int, int] | None] = (None,),
) -> Iterator[Image.Image]:
    """Yield the image of each request in order. An image does not depend on the others of its batch.

    The prompts of the next batch are encoded in a thread while a batch is denoised. `on_frame` receives the index of
    the request, the step and the decoded latents of each step but the last, whose frame is the image itself. `shapes`
    are the heights and widths in pixels of equally long parts of the requests, one after the other; None is the
    pipeline's default.
    """
    part = len(requests) // len(shapes)
    starts = [(index * part + start, index) for index in range(len(shapes)) for start in range(0, part, BATCH_SIZE)]
    batches = [requests[begin : min(begin + BATCH_SIZE, (index + 1) * part)] for begin, index in starts]
    with ThreadPoolExecutor(1) as encoder:
        upcoming = [encoder.submit(conditioning, pipeline, batch) for batch in batches[:1]]
        for number, ((begin, index), batch) in enumerate(zip(starts, batches, strict=True)):
            conditionings, (height, width) = upcoming.pop().result(), shapes[index] or (None, None)
            upcoming += [encoder.submit(conditioning, pipeline, batch) for batch in batches[number + 1 : number + 2]]

            def decode_frames(
                pipeline: PixArtPipeline, step: int, _: Tensor, values: dict[str, Tensor], first: int = begin
            ) -> None:
                if on_frame and step < steps - 1:
                    for index, frame in enumerate(pipeline.decode_latents(values["latents"])):
                        on_frame(first + index, step, frame)

            yield from pipeline(
                conditionings=conditionings,
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(request.seed) for request in batch],
                callback_on_step_end=decode_frames,
            ).images


def conditioning(pipeline: PixArtPipeline, batch: Sequence[SampleRequest]) -> tuple[Conditioning, Conditioning]:
    """Return the conditioning of the prompts or classes of a batch, and the null conditioning."""
    labels = [request.label for request in batch if request.label is not None]
    return pipeline.conditioning(None if labels else [request.prompt for request in batch], labels or None, 1)


def save_gif(frames: Sequence[Image.Image], path: Path) -> None:
    """Save frames as a GIF that repeats, and shows the last one for LAST_FRAME_MS."""
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(path, format="gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
