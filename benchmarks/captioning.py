"""The captioner's stream against bare `LLM.chat` on the same images, already decoded, alternating in one run.

`PYTHON benchmarks/captioning.py MODEL IMAGES` by the Python of an environment with vLLM. The stream is what the caption
job does with a shard: it reads, decodes, screens and captions, with the next images on their way meanwhile.
"""

import argparse
import json
import statistics
import time
from datetime import date
from itertools import cycle, islice
from pathlib import Path

from pixart.config import ScreeningConfig
from pixart.data import captioner as captioners
from pixart.data.captions import make_part, screen
from pixart.data.sources import open_source

COUNT, REPEATS = 256, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("images")
    options = parser.parse_args()
    captioner = captioners.VllmCaptioner(options.model, captioners.Sampling(), "float32")
    captioner._attempts = captioner._attempts[:1]  # a retry is work that the bare call does not do
    source = open_source(options.images)
    begun = time.perf_counter()
    items = list(islice(cycle(list(source.read(0, len(source)))), COUNT))
    read = time.perf_counter() - begun
    limits = ScreeningConfig()
    begun = time.perf_counter()
    images = [screened.image for item in items if (screened := screen(item, limits)).image]
    screened_in = time.perf_counter() - begun
    assert len(images) == COUNT, "the benchmark wants images that all pass"
    conversations = [captioners._conversation(image) for image in images]
    bare, streamed = [], []
    for repeat in range(REPEATS + 1):
        begun = time.perf_counter()
        captioner._engine.chat(conversations, captioner._attempts[0][0], use_tqdm=False)
        middle = time.perf_counter()
        make_part(items, captioner, limits)
        if repeat:  # the first warms up
            bare.append(middle - begun)
            streamed.append(time.perf_counter() - middle)
    ratios = [alone / job for alone, job in zip(bare, streamed, strict=True)]
    lines = [
        f"# Captioning {COUNT} images with a tiny Qwen3-VL on a CPU",
        "",
        f"Settings: {json.dumps(json.loads(captioner.sampling))}",
        "",
        "| stage | seconds |",
        "|---|---|",
        f"| read | {read:.2f} |",
        f"| decode and screen, one thread | {screened_in:.2f} |",
        f"| `LLM.chat` of decoded images: render and generate | {statistics.median(bare):.2f} |",
        f"| the job's stream: decode, screen, render, generate, check, one table | {statistics.median(streamed):.2f} |",
        "",
        f"Images/s of the stream against `LLM.chat`, median of {REPEATS} alternating repetitions: "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).",
    ]
    target = Path(__file__).parent / "results" / f"{date.today()}-captioning.md"
    target.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
