"""Cost of evaluations by counted operations: `python -m benchmarks.evaluation_cost` prints a table.

Counts the denoising alone, of PixArt-alpha XL/2; text encoder, autoencoder and feature extractor are some percent.
"""

import argparse

from pixart.gpu_rates import PEAK_TFLOPS, gpu_hours
from pixart.model.flops import sampling_flops
from pixart.recipes import RECIPES

IMAGES = 30_000  # of PixArt-alpha's protocol for FID
UTILIZATION = 0.4  # of the dense BF16 peak; an assumption, to be replaced by a measurement
GPUS = ("A100", "H100", "B200")
TEXT_DIM = 2048  # of T5Gemma-XL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--utilization", type=float, default=UTILIZATION)
    arguments = parser.parse_args()
    recipe = RECIPES["xl"]("home")
    sizes = {key: value for key, value in recipe.model.dit_arguments().items() if key != "num_classes"}
    config = {**sizes, "text_dim": TEXT_DIM}
    flops = sampling_flops(
        config,
        latent_size=recipe.model.base_latent_size,
        text_tokens=recipe.data.max_text_tokens,
        steps=recipe.sample.steps,
        guidance=recipe.sample.guidance,
    )
    print(f"{flops / 1e12:.1f} TFLOP per image ({recipe.sample.steps} steps, guidance {recipe.sample.guidance})\n")
    print(f"| GPU | hours for {arguments.images:,} images at {arguments.utilization:.0%} of the BF16 peak |\n|---|---|")
    for gpu in GPUS:
        hours = gpu_hours(flops * arguments.images, PEAK_TFLOPS[gpu]["bf16"], arguments.utilization)
        print(f"| {gpu} | {hours:.2f} |")


if __name__ == "__main__":
    main()
