"""The summarize job: merge the shards of an evaluation, compute its figures and write its results and page."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs.state import evaluation, ledger
from jobs.state.evaluation import Request, Variant
from jobs.state.journal import Journal
from jobs.tasks.evaluation.evaluate import RECIPE
from pixart import records
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file
from pixart.config.sampling import EvaluationConfig
from pixart.evaluation.protocol import Protocol

REFERENCE = "reference.npz"  # merged statistics, which a later evaluation can name as its reference
METRICS = "eval"  # prefix of the metrics in MLflow


def run(run_folder: str, *, folder: str) -> dict[str, Any]:
    """Merge the shards of the evaluation in `folder` and return its results, which are also written there.

    Raises ValueError if a shard is missing, or if there are too few images for a distance.
    """
    place, request = Path(folder), evaluation.read(folder)
    for job in (evaluation.SAMPLE, evaluation.JUDGE) if request.is_judged else (evaluation.SAMPLE,):
        if missing := evaluation.missing(folder, request, job):
            raise ValueError(f"{folder}: {len(missing)} shards have no results of {job!r}; run 'evaluate' again")
    config = recipe_file.load(place / RECIPE).evaluation
    reference, described = merge_reference(place, request, config)
    prompts = evaluation.read_prompts(folder)
    variants = [
        summarize(place, request, config, index, reference, described, prompts)
        for index in range(len(request.variants))
    ]
    results = {"hash": request.hash, "request": asdict(request), "reference": described, "variants": variants}
    write_atomically(place / evaluation.RESULTS, json.dumps(results, indent=2) + "\n")
    write_atomically(place / evaluation.PAGE, page(place, request, results, prompts))
    journal = Journal(run_folder)
    for variant in variants:
        journal.metrics(variant["step"], metrics(variant))
    for name in (evaluation.RESULTS, evaluation.PAGE):
        journal.artifact(place / name)
    return {"page": str(place / evaluation.PAGE), "folder": folder}


def page(folder: Path, request: Request, results: dict[str, Any], prompts: list[dict[str, Any]]) -> str:
    """Return the page of the results; the prompts are ranked by the last variant."""
    from pixart.evaluation import page as pages

    variants, reference = results["variants"], results["reference"]
    last = variants[-1]
    facts = {
        "checkpoints": ", ".join(dict.fromkeys(variant["checkpoint"] for variant in variants)),
        "prompts": f"{request.num_prompts:,}, {last['protocol']['num_images']:,} images, hash {request.prompts}",
        "sampler": f"{last['protocol']['sampler']}, seed {request.settings['seed']}, {request.image_size} px",
        "reference": f"{reference['count']:,} images, hash {reference['hash']}, {reference['path']}"
        if reference
        else "none",
        "features": f"{reference['features']} ({reference['features_hash']})" if reference else None,
        "resize": reference.get("resize"),
        "judged by": request.judge or None,
        "folder": str(folder),
    }
    scores = records.read(evaluation.variant_folder(folder, len(variants) - 1) / "scores.json", evaluation.Scores)
    ranking = next((name for name in pages.RANKINGS if name in scores), "")
    ordered = sorted(scores.get(ranking, {}).items(), key=lambda item: item[1])

    def ranked(items: Sequence[tuple[str, float]]) -> list[Any]:
        return [
            pages.Ranked(
                prompt=prompts[int(row) // request.settings["images_per_prompt"]].get("prompt", ""),
                score=score,
                image=evaluation.image_path(folder, len(variants) - 1, int(row)) if request.keeps_images else None,
            )
            for row, score in items
        ]

    best, worst = ordered[: -pages.NUM_RANKED - 1 : -1], ordered[: pages.NUM_RANKED]
    present = {key: value for key, value in facts.items() if value is not None}
    return pages.page(folder.name, present, variants, ranked(best), ranked(worst), ranking)


def metrics(variant: dict[str, Any]) -> dict[str, float]:
    """Return the metrics of a variant for MLflow; settings other than the first ones of a sweep are in their names."""
    prefix = f"{METRICS}/{variant['settings']}" if variant["settings"] else METRICS
    values = {f"{prefix}/{name}": figure["value"] for name, figure in variant["figures"].items()}
    for name, figure in variant["figures"].items():
        values |= {f"{prefix}/{name}_{end}": figure[end] for end in ("low", "high")}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def merge_reference(folder: Path, request: Request, config: EvaluationConfig):
    """Return the merged statistics of the reference and their description; None and {} without a reference."""
    from pixart.evaluation import features, reference, statistics

    kind, path = request.reference["kind"], Path(request.reference["path"])
    if kind == "none":
        return None, {}
    if kind == "statistics":
        return statistics.load(path), {**reference.read_metadata(path), "path": str(path)}
    shards = range(request.num_reference_shards)
    merged = statistics.merge_files([evaluation.statistics_path(folder, None, shard) for shard in shards])
    extractor = features.load(config.features, config.feature_image_size)
    described = {
        "features": extractor.name,
        "features_hash": extractor.hash,
        "resize": extractor.resize,
        "image_size": request.image_size,
        "hash": request.reference["hash"],
        "count": merged.count,
    }
    statistics.save(merged, folder / REFERENCE, described)
    return merged, {**described, "path": str(path)}


def summarize(
    folder: Path,
    request: Request,
    config: EvaluationConfig,
    index: int,
    reference,
    described: dict[str, Any],
    prompts: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the results of one variant, and write the scores of its images to `scores.json` in its folder."""
    from pixart.evaluation import figures, statistics

    variant, shards = request.variants[index], range(request.num_shards)
    estimates = {}
    if reference is not None:
        merged = statistics.merge_files([evaluation.statistics_path(folder, index, shard) for shard in shards])
        estimates = figures.compute(
            merged,
            reference,
            config.distance_names,
            images_per_prompt=config.images_per_prompt,
            replicates=config.num_bootstraps,
        )
    lines = evaluation.read_scores(folder, request, index)
    judged = evaluation.read_scores(folder, request, index, evaluation.JUDGE) if request.is_judged else []
    scores, not_judged, skills = score_images(lines, judged, prompts, config)
    estimates |= scored(scores, config)
    write_atomically(evaluation.variant_folder(folder, index) / "scores.json", json.dumps(scores) + "\n")
    entries = ledger.entries(folder, evaluation.SAMPLE, [index * request.num_shards + shard for shard in shards])
    protocol = protocol_of(request, variant, described)
    return {
        **asdict(variant),
        "settings": settings_of(request, variant),
        "protocol": {**asdict(protocol), "hash": protocol.hash},
        "figures": {name: asdict(estimate) for name, estimate in estimates.items()},
        "skills": {name: asdict(estimate) for name, estimate in skills.items()},
        "judged_by": request.judge,
        "not_judged": not_judged,
        "seconds": sum(entry.seconds for entry in entries.values()),
        "images": request.num_images,
    }


def protocol_of(request: Request, variant: Variant, described: dict[str, Any]) -> Protocol:
    """Return the protocol of a variant's figures."""
    return Protocol(
        prompts=request.prompts,
        num_images=request.num_images,
        seed=request.settings["seed"],
        steps=variant.steps,
        guidance=variant.guidance,
        weights=variant.weights,
        image_size=request.image_size,
        features=described.get("features", ""),
        features_hash=described.get("features_hash", ""),
        resize=described.get("resize", ""),
        reference=described.get("hash", ""),
        num_reference_images=described.get("count", 0),
    )


def settings_of(request: Request, variant: Variant) -> str:
    """Return the settings of a variant in which it differs from others of the request; "" for the first ones."""
    first = request.variants[0]
    parts = [
        f"{name}-{getattr(variant, name):g}" if name != "weights" else variant.weights
        for name in ("weights", "steps", "guidance")
        if getattr(variant, name) != getattr(first, name)
    ]
    return "_".join(parts)


def score_images(
    lines: Sequence[dict[str, Any]],
    judged: Sequence[dict[str, Any]],
    prompts: Sequence[dict[str, Any]],
    config: EvaluationConfig,
):
    """Return the scores of images by figure and row, the number of questions not judged, and the means by skill."""
    from pixart.evaluation.intervals import bootstrap_mean
    from pixart.evaluation.prompt_following import all_right, arithmetic_mean, geometric_mean
    from pixart.evaluation.similarity import text_similarity

    scores: dict[str, dict[int, float]] = {}
    for line in lines:
        if "color" in line:
            scores.setdefault("color", {})[line["row"]] = float(line["color"])
            scores.setdefault("shape", {})[line["row"]] = float(line["shape"])
            scores.setdefault("counted", {})[line["row"]] = float(line["color"] and line["shape"])
        if "clip" in line:
            scores.setdefault("clip_score", {})[line["row"]] = line["clip"]
    by_skill: dict[str, list[tuple[int, float]]] = {}
    not_judged, repeats = 0, config.images_per_prompt
    for line in judged:
        probabilities = line["probabilities"]
        not_judged += sum(value is None for value in probabilities)
        questions = prompts[line["row"] // repeats].get("questions", [])
        for question, value in zip(questions, probabilities, strict=True):
            if value is not None:
                by_skill.setdefault(question["skill"], []).append((line["row"] // repeats, value))
        if (mean := geometric_mean(probabilities)) is not None:
            scores.setdefault("soft_tifa", {})[line["row"]] = mean
            scores.setdefault("soft_tifa_arithmetic", {})[line["row"]] = arithmetic_mean(probabilities)
            scores.setdefault("all_right", {})[line["row"]] = float(bool(all_right(probabilities)))
    captioned = [line for line in judged if line.get("caption")]
    if captioned:
        texts = [prompts[line["row"] // repeats]["prompt"] for line in captioned]
        values = text_similarity([line["caption"] for line in captioned], texts)
        scores["caption_similarity"] = {
            line["row"]: float(value) for line, value in zip(captioned, values, strict=True)
        }
    skills = {}
    for skill, pairs in sorted(by_skill.items()):
        groups, probable = zip(*pairs, strict=True)
        skills[skill] = bootstrap_mean(probable, as_array(groups), replicates=config.num_bootstraps)
    return scores, not_judged, skills


def scored(scores: dict[str, dict[int, float]], config: EvaluationConfig) -> dict[str, Any]:
    """Return the mean of each score over its images, with the interval under resampling of the prompts."""
    from pixart.evaluation.intervals import bootstrap_mean

    return {
        name: bootstrap_mean(
            list(values.values()),
            as_array([row // config.images_per_prompt for row in values]),
            replicates=config.num_bootstraps,
        )
        for name, values in scores.items()
    }


def as_array(values: Sequence[int]):
    import numpy as np

    return np.asarray(values)
