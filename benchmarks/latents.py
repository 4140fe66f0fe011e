"""Benchmark the latents job against the VAE alone on the same batches, alternating in one run.

In `python -m benchmarks.latents IMAGES VAE`, IMAGES is a folder of images and VAE the folder of an autoencoder.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch

from benchmarks import measure
from jobs.tasks import caption, latents
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.encoders.text_encoder import TextEncoder
from pixart.data.encoders.vae import encode, load_vae
from pixart.data.images.screening import decode, resize_and_crop
from pixart.data.store import zarr_store

REPEATS = 5
SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("images")
    parser.add_argument("vae")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig(path=folder, source=options.images, num_shards=1, image_size=SIZE, vae=options.vae)
        manifest = manifests.make(data)
        manifests.write(manifest)
        zarr_store.create(manifest)
        caption.run(folder, [0])
        source, vae = manifests.open_images(manifest), load_vae(data.vae)
        text = TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
        valid = np.array(caption.read_part(folder, 0)["valid"].to_pylist())
        items = [item for item, kept in zip(source.read(*manifest.shard_range(0)), valid, strict=True) if kept]
        pictures = [np.asarray(resize_and_crop(decode(item.data, data.screening), SIZE, SIZE)) for item in items]
        batches = [
            np.stack(pictures[begin : begin + latents.BATCH]) for begin in range(0, len(pictures), latents.BATCH)
        ]
        vae_only, job = [], []
        for repeat in range(REPEATS + 1):
            begun = time.perf_counter()
            for batch in batches:
                encode(vae, batch, data.pixel_range)
            encoded = time.perf_counter()
            latents.encode_shard(manifest, 0, source, vae, text)
            if repeat:  # the first repetition warms up
                vae_only.append(len(items) / (encoded - begun))
                job.append(len(items) / (time.perf_counter() - encoded))
    ratios = [job_rate / vae_rate for job_rate, vae_rate in zip(job, vae_only, strict=True)]
    lines = [
        f"# The latents job, {len(items)} images of {SIZE} px, {torch.get_num_threads()} threads on a CPU",
        "",
        "| | images/s, median |",
        "|---|---|",
        f"| VAE alone | {statistics.median(vae_only):.1f} |",
        f"| complete job: read, decode, resize, encode, tokenize, write, ledger | {statistics.median(job):.1f} |",
        "",
        f"Ratio, median of {REPEATS} alternating repetitions: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}).",
    ]
    measure.write("latents", lines)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
