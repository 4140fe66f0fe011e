"""Benchmark the caption job's stream against `LLM.chat` on the same decoded images, alternating on one engine.

Run `PYTHON -m benchmarks.captioning MODEL IMAGES` from the repository's root, where PYTHON is the interpreter of an
environment with vLLM.

The stream does the caption job's work on a shard: it decodes, screens, captions and validates, and prepares the next
images while the engine generates. It is measured with images of their original size; with images that were screened
beforehand, which excludes the cost of decoding; and with images enlarged to two megapixels. Captions with a problem are
not attempted again, because `LLM.chat` does not do so either. As in a dataset, no image occurs twice: mirrored and
flipped copies are added if there are too few images, and the engine's caches are cleared before each repetition.
"""

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageOps

from benchmarks import measure
from pixart.config.captions import CaptionsConfig
from pixart.config.dataset import ScreeningConfig
from pixart.data.captions import captioner as captioners
from pixart.data.captions import table as captions
from pixart.data.images import screening
from pixart.data.sources.base import Item
from pixart.data.sources.open import open_source

COUNT, REPEATS = 256, 7
LARGE = (1632, 1224)  # pixels


class Clock:
    """Time in seconds spent in wrapped functions, by stage, summed over threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, stage: str, function: Callable) -> Callable:
        """Return `function` wrapped so that the time of its calls is added to `stage`."""

        def call(*arguments, **keywords):
            begun = time.perf_counter()
            result = function(*arguments, **keywords)
            self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - begun
            return result

        return call


def transformed(item: Item, change: Callable[[Image.Image], Image.Image]) -> Item:
    """Return the item with its image transformed by `change` and encoded as JPEG."""
    encoded = io.BytesIO()
    change(Image.open(io.BytesIO(item.data)).convert("RGB")).save(encoded, "JPEG", quality=90)
    return replace(item, data=encoded.getvalue())


def enlarged(item: Item) -> Item:
    """Return the item with its image resized to LARGE."""
    return transformed(item, lambda image: image.resize(LARGE))


def distinct(items: list[Item]) -> list[Item]:
    """Return up to COUNT items with distinct images; mirrored and flipped copies follow the original ones."""
    others = [transformed(item, change) for change in (ImageOps.mirror, ImageOps.flip) for item in items]
    return [replace(item, id=str(number)) for number, item in enumerate([*items, *others][:COUNT])]


def clear_caches(engine) -> None:
    """Clear the engine's prefix cache and encoder cache."""
    engine.reset_prefix_cache()
    engine.llm_engine.reset_encoder_cache()


def compare(
    name: str, captioner: captioners.VllmCaptioner, items: list[Item], read: float, *, beforehand: bool = False
) -> str:
    """Benchmark the stream and `LLM.chat` on `items` and return a row of the Markdown table.

    `read` is the time in seconds of reading COUNT items. `beforehand` screens the images before the clock starts.
    """
    limits, engine, clock = ScreeningConfig(), captioner._engine, Clock()
    screened = {item.id: captions.screen(item, limits) for item in items}
    assert all(result.image for result in screened.values()), (
        "IMAGES: some were rejected; the benchmark needs images that pass screening"
    )
    images = [screening.decode(item.data, limits) for item in items]
    instruction = captioner.captions.image_instruction
    conversations = [
        captioners.conversation(instruction, {"type": "image_pil", "image_pil": image}) for image in images
    ]
    screen, enqueue, step = captions.screen, engine.enqueue, engine.llm_engine.step
    chat, streamed = [], []
    for repeat in range(REPEATS + 1):
        clear_caches(engine)
        begun = time.perf_counter()
        engine.chat(conversations, captioner.sampling_params(0, seed=0), use_tqdm=False)
        chat.append(time.perf_counter() - begun)
        if repeat == 1:  # the first repetition warms up
            clock.seconds.clear()
        captions.screen = clock.timed(STAGES[0], (lambda item, limits: screened[item.id]) if beforehand else screen)
        engine.enqueue = clock.timed("render", enqueue)
        engine.llm_engine.step = clock.timed("wait for generation", step)
        clear_caches(engine)
        begun = time.perf_counter()
        table = captions.make_part(items, captioner, limits)
        clock.timed("write", pq.write_table)(table, io.BytesIO())
        streamed.append(time.perf_counter() - begun)
        captions.screen, engine.enqueue, engine.llm_engine.step = screen, enqueue, step
        print(f"{name}: LLM.chat {chat[-1]:.2f} s, stream {streamed[-1]:.2f} s", flush=True)
    ratios = [chat_seconds / job for chat_seconds, job in zip(chat[1:], streamed[1:], strict=True)]
    stages = [read, *(clock.seconds[stage] / REPEATS for stage in STAGES)]
    figures = [*stages, statistics.median(streamed[1:]), statistics.median(chat[1:]), statistics.median(ratios)]
    cells = " | ".join(f"{figure:.2f}" for figure in figures)
    return f"| {name} | {cells} ({min(ratios):.2f} to {max(ratios):.2f}) |"


STAGES = ("decode and screen", "render", "wait for generation", "write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("images")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    captioner = captioners.VllmCaptioner(options.model, CaptionsConfig(), options.dtype)
    captioner.num_attempts = 1
    source = open_source(options.images)
    begun = time.perf_counter()
    items = list(islice(source.read(0, len(source)), COUNT))
    read = (time.perf_counter() - begun) * COUNT / len(items)
    items = distinct(items)
    rows = [compare("original size", captioner, items, read)]
    rows.append(compare("original size, screened beforehand", captioner, items, read, beforehand=True))
    rows.append(compare("2 megapixels", captioner, [enlarged(item) for item in items], read))
    lines = [
        f"# {COUNT} images captioned with {Path(options.model).name}, {os.cpu_count()} CPU cores",
        "",
        f"Settings: {captioner.sampling}. Seconds, medians of {REPEATS} alternating repetitions; the stages are those "
        "within the stream, where they overlap. Images/s of the stream relative to `LLM.chat` on decoded images:",
        "",
        f"| images | read | {' | '.join(STAGES)} | stream in total | `LLM.chat` | ratio |",
        "|---" * (len(STAGES) + 5) + "|",
        *rows,
    ]
    measure.write("captioning", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
