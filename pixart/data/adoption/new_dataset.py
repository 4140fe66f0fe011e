"""The manifest of a dataset that is made from precomputed shards."""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart.config.dataset import DataConfig
from pixart.data.adoption import shards as shard_files
from pixart.data.adoption.forms import Shard
from pixart.data.adoption.open import open_shard
from pixart.data.adoption.shards import NUM_THREADS, ShardRecord, find_shards, make_records
from pixart.data.adoption.validity import convert_latents
from pixart.data.encoders.text_encoder import text_dim
from pixart.data.encoders.vae import downsampling_factor, latent_channels
from pixart.data.manifest import ADOPTED, Adoption, Form, Manifest, model_fingerprint

LABEL_BATCH_SIZE = 64  # rows whose latents are read together to find the largest label


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the manifest needs to know of one shard."""

    form: Form
    rows: int
    latent_shape: tuple[int, int, int]
    max_text_tokens: int | None
    largest_label: int | None


def make(data: DataConfig, class_names: Sequence[str], chosen: Collection[str]) -> tuple[Manifest, list[ShardRecord]]:
    """Build the manifest of a dataset from the shards at `data.source`, and the records of these.

    `chosen` names the fields of `data` that the user has set: a value that the shards contradict raises ValueError, as
    do shards that are damaged or differ in form or shape, more classes than `class_names`, and models that do not fit.
    Without `class_names`, classes are named by their indices, up to the largest label of a valid row.
    """
    paths = find_shards(data.source)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        summaries = list(threads.map(lambda path: summarize(path, is_sample=bool(class_names)), paths))
    first = summaries[0]
    for path, summary in zip(paths, summaries, strict=True):
        if kind(summary) != kind(first):
            raise ValueError(f"{path}: holds {kind(summary)}, and {paths[0].name} {kind(first)}; adopt them separately")
    check_models(data, first, chosen)
    data = with_shard_facts(data, first, len(paths), chosen)
    records = make_records(paths, [summary.rows for summary in summaries])
    manifest = Manifest(
        data=data,
        images=sum(summary.rows for summary in summaries),
        rows_per_shard=max(summary.rows for summary in summaries),
        class_names=tuple(name_classes(data.source, summaries, class_names)),
        latent_shape=first.latent_shape,
        text_dim=text_dim(data.text_encoder),
        models={
            "vae": model_fingerprint(data, "vae"),
            "text_encoder": model_fingerprint(data, "text_encoder"),
            "captioner": f"{ADOPTED}-{shard_files.digest(records)}",
        },
        adopted=Adoption(form=first.form, shard_rows=tuple(summary.rows for summary in summaries)),
    )
    return manifest, records


def summarize(path: Path, *, is_sample: bool) -> Summary:
    """Open a shard and describe it; with `is_sample`, labels are not read if that takes reading the whole file."""
    shard = open_shard(path)
    return Summary(
        form=shard.form,
        rows=shard.rows,
        latent_shape=shard.latent_shape,
        max_text_tokens=shard.max_text_tokens,
        largest_label=largest_label(shard, is_sample=is_sample),
    )


def largest_label(shard: Shard, *, is_sample: bool) -> int | None:
    """Return the largest label of a row with latents; None for forms without labels or a shard without such a row."""
    rows_and_labels = shard.labels(is_sample=is_sample)
    if rows_and_labels is None:
        return None
    rows, labels = rows_and_labels
    order = np.argsort(labels, kind="stable")[::-1]
    for start in range(0, len(order), LABEL_BATCH_SIZE):
        batch = order[start : start + LABEL_BATCH_SIZE]
        valid = convert_latents(shard.take(rows[batch])).problems == ""
        if valid.any():
            return int(labels[batch][valid][0])
    return None


def kind(summary: Summary) -> str:
    """Return the properties that all shards of a dataset share, as text."""
    tokens = f", captions of {summary.max_text_tokens} tokens" if summary.max_text_tokens else ""
    return f"{summary.form} with latents of shape {summary.latent_shape}{tokens}"


def check_models(data: DataConfig, shard: Summary, chosen: Collection[str]) -> None:
    """Check the VAE and the text encoder. Raises ValueError for one that is not named or does not fit the shards."""
    channels, height, width = shard.latent_shape
    if height != width:
        raise ValueError(f"source {data.source}: the latents are {height} x {width}; a dataset has square latents")
    if latent_channels(data.vae) != channels:
        raise ValueError(
            f"data.vae={data.vae}: has {latent_channels(data.vae)} latent channels, and the shards have {channels}; "
            "name the VAE that encoded them"
        )
    if shard.max_text_tokens and "text_encoder" not in chosen:
        raise ValueError(
            f"source {data.source}: the shards hold token ids; name the text encoder whose tokenizer made them by "
            "--set data.text_encoder=NAME"
        )


def with_shard_facts(data: DataConfig, shard: Summary, num_shards: int, chosen: Collection[str]) -> DataConfig:
    """Return the configuration with the values that the shards fix.

    Raises ValueError if the user has chosen another value for one of them.
    """
    facts: dict[str, Any] = {
        "num_shards": num_shards,
        "max_images": None,
        "image_size": shard.latent_shape[1] * downsampling_factor(data.vae),
        "max_text_tokens": shard.max_text_tokens or data.max_text_tokens,
        "short_captions": shard.form in ("captions", "texts"),
        "store_text_embeddings": False,
        "captioner": ADOPTED,
    }
    for name in sorted(facts.keys() & set(chosen)):
        if getattr(data, name) != facts[name]:
            raise ValueError(f"data.{name}={getattr(data, name)}: with these shards it is {facts[name]}; leave it out")
    return replace(data, **facts)


def name_classes(source: str, summaries: Sequence[Summary], class_names: Sequence[str]) -> Sequence[str]:
    """Return the names of the classes: those given, else the indices up to the largest label.

    Without a valid row there are no names. Raises ValueError for names of shards without labels, and for a label beyond
    the names.
    """
    if summaries[0].form != "labels":
        if class_names:
            raise ValueError(f"--class-names: the shards of {source} have no labels; leave it out")
        return ()
    largest = max((summary.largest_label for summary in summaries if summary.largest_label is not None), default=-1)
    if class_names and largest >= len(class_names):
        raise ValueError(
            f"--class-names: the file has {len(class_names)} names, and the shards have the label {largest}; "
            "give one name for each class, in the order of the labels"
        )
    return class_names or [str(label) for label in range(largest + 1)]
