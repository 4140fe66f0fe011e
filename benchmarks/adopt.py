"""Benchmark the adoption of shards against a plain read, write and fsync of the same bytes, alternating in one run.

`python -m benchmarks.adopt` makes one shard of each `.pt` form with ROWS rows; token ids are those of captions of the
demo's scenes.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from jobs.tasks import adopt
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.adoption.rows import TextColumns
from pixart.data.encoders.text_encoder import Tokenizer, load_tokenizer
from pixart.demo.scenes import caption, make_scene
from pixart.recipes import demo

SHAPE = (16, 32, 32)
TOKENS = {"captions": 100, "tokens": 120}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--folder", help="file system to write to (default: that of temporary files)")
    options = parser.parse_args()
    lines = [
        f"# Adoption of shards of {options.rows} rows, {os.cpu_count()} CPU cores",
        "",
        "`numpy.fromfile`, `tofile` and fsync of the shard's bytes against the whole task: read, check, convert, "
        "decode captions, write with checksums, ledger.",
        "",
        "| form | MB | plain, MB/s | adopted, MB/s | ratio, median (range) |",
        "|---|---|---|---|---|",
    ]
    for form in ("labels", "tokens", "captions"):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            lines.append(row(form, Path(folder), options.rows, options.repeats))
        print(lines[-1], flush=True)
    measure.write("adopt", lines)


def row(form: str, folder: Path, rows: int, repeats: int) -> str:
    """Return the line of a form in the table."""
    shard = folder / "shard_000000.pt"
    torch.save(entries(form, rows), shard)
    os.sync()
    size = shard.stat().st_size / 1e6
    recipe = demo(str(folder))

    overrides = {"source": str(shard), "captioner": "adopted", "max_images": None, "store_text_embeddings": False}
    data = dataclasses.replace(recipe.data, path=f"{folder}/dataset", num_shards=1, pixel_range=(0, 1), **overrides)
    recipe = dataclasses.replace(recipe, data=data)
    adopt.init(to_json(recipe), [], ["vae", "text_encoder"])
    manifest = manifests.read(recipe.data.path)
    text = TextColumns(manifest, load_tokenizer(data.text_encoder))
    plain, adopted = [], []
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        with (folder / "copy").open("wb") as file:
            np.fromfile(shard, np.uint8).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        middle = time.perf_counter()
        with adopt.one_torch_thread():
            adopt.adopt_shard(manifest, 0, text)
        if repeat:  # the first repetition warms up
            plain.append(size / (middle - begun))
            adopted.append(size / (time.perf_counter() - middle))
    ratios = sorted(mine / bare for mine, bare in zip(adopted, plain, strict=True))
    return (
        f"| {form} | {size:.0f} | {statistics.median(plain):.0f} | {statistics.median(adopted):.0f} "
        f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
    )


def entries(form: str, rows: int) -> dict[str, torch.Tensor]:
    """Return the content of a shard: latents of unit variance, and labels or the tokens of captions."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.empty(rows, *SHAPE, dtype=torch.bfloat16).normal_(generator=generator)
    if form == "labels":
        return {"latents": latents, "labels": torch.randint(1000, (rows,), generator=generator).to(torch.int16)}
    tokenizer = Tokenizer(load_tokenizer("minilm"), max_tokens=TOKENS[form])
    texts = [" ".join(caption(make_scene(seed, 0)) for seed in range(row, row + 4)) for row in range(rows)]
    ids, mask = (torch.from_numpy(array) for array in tokenizer.tokenize(texts))
    if form == "tokens":
        return {"latents": latents, "text_tokens": ids, "attn_mask": mask.to(torch.int8)}
    names = ("short_caption", "long_caption")
    captions = {name: ids for name in names} | {f"{name}_mask": mask.to(torch.int8) for name in names}
    return {"latents": latents, **captions}


if __name__ == "__main__":
    main()
