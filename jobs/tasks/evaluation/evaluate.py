"""The evaluate job: sample images of a checkpoint, shard by shard, and write mergeable statistics of their features.

The shards of the reference are elements of the same array. A shard's files are written first, its ledger entry last.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.state import evaluation, ledger
from jobs.state.evaluation import Request, Variant
from jobs.tasks.caption import for_each_shard
from jobs.tasks.sample import load_weights, open_pipeline, origin, with_command
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file
from pixart.evaluation.protocol import image_seed

RECIPE = "config.json"
BATCH_SIZE = 32  # images whose features are extracted together
MAX_PENDING = 64  # images that wait to be written


def run(folder: str, elements: list[int]) -> None:
    """Process elements one after the other; those with a ledger entry of this request are skipped.

    Raises ValueError or RuntimeError at the end if an element failed.
    """
    request = evaluation.read(folder)
    todo = [element for element in elements if not evaluation.is_complete(folder, request, element)]
    if todo:
        worker = Worker(Path(folder), request)
        worker.check_extractor()
        for_each_shard(todo, worker.process)


class Worker:
    """Samples and extracts for one process; models are loaded once, when they are first needed."""

    def __init__(self, folder: Path, request: Request) -> None:
        self.folder, self.request = folder, request
        self.recipe = recipe_file.load(folder / RECIPE)
        self.prompts = evaluation.read_prompts(folder)
        self.loaded: tuple[tuple[str, str], Any, dict[str, str]] | None = None  # key, pipeline, provenance

    @cached_property
    def extractor(self):
        from pixart.evaluation import features

        return features.load(self.recipe.evaluation.features, self.recipe.evaluation.feature_image_size)

    @cached_property
    def clip(self):
        from pixart.evaluation.similarity import ClipScorer

        return ClipScorer(self.request.clip)

    def check_extractor(self) -> None:
        """Raise ValueError if the extractor does not fit the reference or the number of images, before any sampling."""
        from pixart.evaluation import reference

        if self.request.reference["kind"] == "none":
            return
        config = self.recipe.evaluation
        if "fd" in config.distance_names and self.request.num_images <= self.extractor.dim:
            raise ValueError(too_few_images_for(self.request.num_images, self.extractor.dim))
        if self.request.reference["kind"] == "statistics":
            path = Path(self.request.reference["path"])
            expected = {"features_hash": self.extractor.hash, "resize": self.extractor.resize}
            reference.check_metadata(path, reference.read_metadata(path), **expected)

    def process(self, element: int) -> None:
        """Write the results of an element, and its ledger entry."""
        begun = time.monotonic()
        variant, shard = self.request.locate(element)
        rows, valid, checksum = self.reference_shard(shard) if variant is None else self.sample_shard(variant, shard)
        entry = ledger.Entry(
            manifest=self.request.hash,
            inputs="",
            rows=rows,
            valid=valid,
            checksum=checksum,
            seconds=time.monotonic() - begun,
            versions={"python": platform.python_version()},
        )
        ledger.record(self.folder, evaluation.SAMPLE, element, entry)

    def reference_shard(self, shard: int) -> tuple[int, int, str]:
        """Write the statistics of a shard of the reference; return its rows, those that were readable and a hash."""
        from pixart.evaluation import reference, statistics

        rows, limit = self.request.reference_rows(shard), self.recipe.evaluation.num_reference_images
        if self.request.reference["kind"] == "dataset":
            from pixart.data import manifest as manifests

            images = reference.dataset_images(manifests.read(self.request.reference["path"]), rows, limit)
        else:
            path = Path(self.request.reference["path"])
            images = reference.folder_images(path, rows, limit, self.request.image_size)
        collected = self.empty_statistics()
        while batch := list(islice(images, BATCH_SIZE)):
            numbers, pictures = zip(*batch, strict=True)
            collected = collected.add(numbers, self.extractor.extract(pictures))
        checksum = statistics.save(collected, evaluation.statistics_path(self.folder, None, shard))
        return len(rows), collected.count, checksum

    def sample_shard(self, index: int, shard: int) -> tuple[int, int, str]:
        """Write the statistics, scores and images of a shard of a variant; return its images twice and a hash."""
        from pixart.evaluation import statistics

        variant, rows = self.request.variants[index], self.request.rows(shard)
        pipeline, provenance = self.pipeline(variant)
        collected = self.empty_statistics() if self.request.reference["kind"] != "none" else None
        scores: list[dict[str, Any]] = []
        images = self.sample(pipeline, variant, index, rows, provenance)
        while batch := list(islice(images, BATCH_SIZE)):
            numbers, pictures = zip(*batch, strict=True)
            if collected is not None:
                collected = collected.add(numbers, self.extractor.extract(pictures))
            scores += self.score(numbers, pictures)
        digest = hashlib.sha256()
        if collected is not None:
            digest.update(statistics.save(collected, evaluation.statistics_path(self.folder, index, shard)).encode())
        text = "".join(json.dumps(line) + "\n" for line in scores)
        write_atomically(evaluation.scores_path(self.folder, index, shard), text)
        digest.update(text.encode())
        return len(rows), len(scores), digest.hexdigest()

    def sample(
        self, pipeline, variant: Variant, index: int, rows: range, provenance: dict[str, str]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the row and image of each of `rows`; images are written meanwhile, if the request keeps them."""
        from pixart.sampling.images import SampleRequest, generate, save_png

        repeats, seed = self.request.settings["images_per_prompt"], self.request.settings["seed"]
        pictures = []
        for row in rows:
            prompt = self.prompts[row // repeats]
            subject = {key: prompt[key] for key in ("prompt", "label", "class_name") if key in prompt}
            pictures.append(SampleRequest(seed=image_seed(seed, row // repeats, row % repeats), **subject))
        folder = evaluation.variant_folder(self.folder, index) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        pending: list[Future[None]] = []
        with ThreadPoolExecutor(1) as writer:
            generated = generate(pipeline, pictures, steps=variant.steps, guidance=variant.guidance)
            for row, picture, image in zip(rows, pictures, generated, strict=True):
                if self.request.keeps_images:
                    sampling = {"steps": str(variant.steps), "guidance": str(variant.guidance)}
                    settings = {**picture.settings(), **sampling, "size": f"{image.width}x{image.height}", **provenance}
                    path = evaluation.image_path(self.folder, index, row)
                    pending.append(writer.submit(save_png, image, path, with_command(settings)))
                if len(pending) >= MAX_PENDING:
                    pending.pop(0).result()
                yield row, image
            for writing in pending:
                writing.result()

    def score(self, rows: tuple[int, ...], images: tuple[Any, ...]) -> list[dict[str, Any]]:
        """Return the scores of images: their color and shape for demo scenes, the CLIP score where a CLIP is given."""
        import numpy as np

        repeats = self.request.settings["images_per_prompt"]
        prompts = [self.prompts[row // repeats] for row in rows]
        lines: list[dict[str, Any]] = [{"row": row} for row in rows]
        for line, prompt, image in zip(lines, prompts, images, strict=True):
            if "scene" in prompt:
                from pixart.demo.scene_scorer import read_scene
                from pixart.demo.scenes import make_scene

                reading, scene = read_scene(np.asarray(image)), make_scene(*prompt["scene"])
                line |= {"color": reading.color == scene.color, "shape": reading.shape == scene.shape}
        if self.request.clip:
            values = self.clip.score(images, [prompt["prompt"] for prompt in prompts])
            for line, value in zip(lines, values, strict=True):
                line["clip"] = float(value)
        return lines

    def pipeline(self, variant: Variant) -> tuple[Any, dict[str, str]]:
        """Return the pipeline of a variant's checkpoint and the provenance of its images; one is kept at a time."""
        key = (variant.checkpoint, variant.weights)
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # frees the previous one first
            path = Path(variant.checkpoint)
            model, record = load_weights(path, variant.weights, None)
            pipeline, sources = open_pipeline(model, record, self.recipe, path, export=False)
            pipeline.to(pipeline.vae.device)
            provenance = {**origin(self.folder, model.stage, record, path, variant.weights), **sources}
            self.loaded = (key, pipeline, provenance)
        return self.loaded[1:]

    def empty_statistics(self):
        from pixart.evaluation.statistics import FeatureStatistics

        return FeatureStatistics.empty(self.extractor.dim, self.recipe.evaluation.num_sampled_features)


def too_few_images_for(num_images: int, dim: int) -> str:
    """Return the error about fewer images than a covariance needs."""
    return (
        f"{num_images} images: the Fréchet distance needs more than {dim} for a covariance of features of width {dim}; "
        "give more prompts, a narrower layer by evaluation.features, or evaluation.distances without fd"
    )
