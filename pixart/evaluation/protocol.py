"""The protocol of a figure: everything but the checkpoint that it depends on. Imports nothing heavy.

Figures of different protocols are not compared, and not drawn as one curve.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAMPLER = "flow-match Euler"
NEIGHBOR_FIGURES = ("precision", "recall", "density", "coverage")
MIN_NEIGHBOR_IMAGES = 1000  # from which on shares of neighborhoods hardly depend on the number of images


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How the images of a figure were made and compared."""

    prompts: str  # hash of the prompts
    num_images: int
    seed: int
    sampler: str = SAMPLER
    steps: int
    guidance: float
    weights: str  # ema or master
    image_size: int  # pixels per side of the sampled images
    features: str  # name of the extractor
    features_hash: str
    resize: str
    reference: str  # hash of the reference
    num_reference_images: int

    @property
    def hash(self) -> str:
        """Eight hexadecimal digits that identify the protocol."""
        return short_hash(dataclasses.asdict(self))


def short_hash(value: Any, digits: int = 8) -> str:
    """Return hexadecimal digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return a description of each field in which two protocols, as dictionaries, differ."""
    return [
        f"{name} {first.get(name)!r} and {second.get(name)!r}"
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name)
    ]


def image_seed(seed: int, prompt: int, repeat: int) -> int:
    """Return the seed, below 2**48, of the initial noise of image `repeat` of the prompt with index `prompt`.

    It does not depend on the number of shards, so that two checkpoints are compared on the same noise.
    """
    return int.from_bytes(hashlib.sha256(f"{seed} {prompt} {repeat}".encode()).digest()[:6])


def remarks(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return sentences about distances that do not rank checkpoints, with the reason, by their values and numbers."""
    sentences = []
    shares = [figures[name] for name in NEIGHBOR_FIGURES if name in figures]
    if shares and all(share["value"] == 0 for share in shares):
        sentences.append(
            f"{', '.join(NEIGHBOR_FIGURES)} are 0: in these features no generated image is as near to a reference "
            "image as that one's neighbors, so that they rank nothing; compare by fd or sliced_wasserstein."
        )
    elif shares and (count := min(share["count"] for share in shares)) < MIN_NEIGHBOR_IMAGES:
        sentences.append(
            f"{', '.join(NEIGHBOR_FIGURES)} are of {count:,} images: their neighborhoods grow as images get fewer; "
            f"compare them between equal numbers only, and with others from {MIN_NEIGHBOR_IMAGES:,} on."
        )
    kid = figures.get("kid")
    if kid and kid["low"] <= 0 <= kid["high"]:
        sentences.append(
            f"kid is not distinguished from 0 by {kid['count']:,} images: its interval holds 0; give more prompts, or "
            "compare by sliced_wasserstein."
        )
    return sentences
