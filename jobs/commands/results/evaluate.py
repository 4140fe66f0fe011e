"""Evaluate checkpoints by distances and prompt following, with intervals.

Samples every checkpoint by an array job, whose shards are merged afterwards. The same command continues an evaluation
that was interrupted. The keys evaluation.* set the feature extractor, the distances, the prompts and the shards.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, RecipeOptions, SubmissionOptions, argument, non_negative, option, positive
from jobs.commands.results import evaluation_inputs as inputs
from jobs.state import evaluation
from jobs.state import run as runs
from jobs.state.evaluation import JUDGE, SAMPLE, Request
from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.submit import run_elements, run_ranks
from jobs.submission.wait import dependencies
from pixart.config.recipe import to_json
from pixart.evaluation.protocol import remarks, short_hash
from slurm.executor import Cluster

SUMMARIZE = "summarize"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, SubmissionOptions):
    """The options of `evaluate`."""

    checkpoints: tuple[str, ...] = argument(
        "CHECKPOINT", convert=str, help="Checkpoint, run folder or FP8 export (inference/); several make a curve."
    )
    every_checkpoint: bool = option(
        "--every-checkpoint", default=False, help="Evaluate all checkpoints of each run (default: its newest)."
    )
    reference: str | None = option(
        "--reference",
        metavar="DATASET|FOLDER|FILE",
        help="Images to compare with: a dataset, a folder of images, the reference.npz of an evaluation, or none "
        "(default: the dataset of the checkpoint).",
    )
    prompts: str | None = option(
        "--prompts",
        metavar="FILE",
        help="File of prompts: text with one per line, JSON lines (of GenEval or GenEval 2 with their questions), or "
        "the captions of COCO as .json (default: captions of the dataset; for the demo, unseen scenes).",
    )
    weights: tuple[Literal["ema", "master"], ...] = option(
        "--weights",
        metavar="WEIGHTS",
        default=(),
        convert=inputs.weights,
        help="Weights: ema or master; repeatable (default: ema).",
    )
    guidance: tuple[float, ...] = option(
        "--guidance",
        metavar="SCALE",
        default=(),
        convert=non_negative,
        help="Scale of guidance; several make a curve (default: sample.guidance).",
    )
    steps: tuple[int, ...] = option(
        "--steps",
        metavar="N",
        default=(),
        convert=positive,
        help="Number of sampling steps; repeatable (default: sample.steps).",
    )
    judge: str | None = option(
        "--judge",
        metavar="MODEL",
        help="Vision-language model that answers the questions of the prompts by vLLM, by folder or hub name "
        "(default: the questions are not judged).",
    )
    caption_back: bool = option(
        "--caption-back",
        default=False,
        help="Also caption each image by the judge and compare the caption with the prompt (default: do not).",
    )
    clip: str | None = option(
        "--clip", metavar="FOLDER", help="CLIP model of transformers for the CLIP score (default: no CLIP score)."
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    with launching("evaluate", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(evaluate(launch, options))
    return 0


def evaluate(launch: Launch, options: Options) -> str:
    """Check the options, submit the jobs that are missing, and describe them or their results."""
    request, prompts = make_request(launch, options)
    folder = launch.home / evaluation.FOLDER / f"{name_of(request)}-{request.hash}"
    print(describe_memory(launch, request), flush=True)
    last = submit(launch, request, prompts, folder)
    if not launch.wait:
        return f"evaluation: {folder}\n{describe_submission(options, last)}"
    return (
        f"evaluated: {folder / evaluation.PAGE}\n{describe_results(folder)}\n"
        f"next: {next_command(options, 'compare', str(folder), 'OTHER')}"
    )


def make_request(launch: Launch, options: Options) -> tuple[Request, list[dict[str, Any]]]:
    """Return what to evaluate and the prompts, and set the recipe's `data` to the dataset.

    Raises ValueError if the options do not fit each other, the checkpoints, the dataset or the reference.
    """
    records = inputs.find_checkpoints(options.checkpoints, every=options.every_checkpoint)
    manifest = inputs.open_dataset_of(launch, options, records)
    config = launch.recipe.evaluation
    stage = inputs.common_stage(records)
    prompts = inputs.make_prompts(launch, options.prompts, stage, manifest, records)
    inputs.check_judging(options.judge, options.clip, prompts, stage, caption_back=options.caption_back)
    reference = inputs.find_reference(launch, options.reference, manifest)
    inputs.check_features(launch, reference, len(prompts) * config.images_per_prompt)
    if any("questions" in prompt for prompt in prompts) and not options.judge:
        print("warning: the prompts have questions, and no model judges them; give --judge", file=sys.stderr)
    sample = launch.recipe.sample
    request = Request(
        variants=tuple(
            inputs.variant(path, record, weights, steps, guidance)
            for path, record in records
            for weights in options.weights or ("ema",)
            for guidance in options.guidance or (sample.guidance,)
            for steps in options.steps or (sample.steps,)
        ),
        prompts=short_hash(prompts),
        num_prompts=len(prompts),
        reference=reference,
        settings=asdict(config),
        data=launch.dataset,
        data_hash=manifest["hash"],
        image_size=launch.recipe.data.image_size,
        judge=inputs.absolute(options.judge),
        caption_back=options.caption_back,
        clip=inputs.absolute(options.clip),
    )
    return request, prompts


def name_of(request: Request) -> str:
    """Return the first part of the folder's name."""
    checkpoints = {variant.checkpoint for variant in request.variants}
    return f"step-{request.variants[0].step}" if len(checkpoints) == 1 else f"{len(checkpoints)}-checkpoints"


def submit(launch: Launch, request: Request, prompts: list[dict[str, Any]], folder: Path) -> Run:
    """Submit what is missing of sampling, judging and the summary; return the run of the summary."""

    def prepare() -> None:
        if not (folder / evaluation.REQUEST).exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(to_json(launch.recipe) + "\n")
            evaluation.write(folder, request, prompts)

    checkpoints = list(dict.fromkeys(variant.checkpoint for variant in request.variants))
    after: list[str] = []
    for kind in (SAMPLE, JUDGE) if request.is_judged else (SAMPLE,):
        if elements := evaluation.missing(folder, request, kind):
            if kind == JUDGE:
                use_python_of_captioner(launch)
            submitted = run_elements(
                launch,
                kind,
                folder,
                elements,
                request={"folder": str(folder), "checkpoints": checkpoints},
                prepare=prepare,
                after=after,
            )
            after = dependencies(launch, submitted)
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(SUMMARIZE, 1, 1),
        {"folder": str(folder)},
        parameters={
            "evaluation": folder.name,
            "prompts": request.num_prompts,
            "features": request.settings["features"],
            "judged by": request.judge or None,
        },
        tags={"pixart.evaluation": str(folder), "pixart.parent_checkpoint": checkpoints[-1]},
        total=1,
        after=after,
    )


def use_python_of_captioner(launch: Launch) -> None:
    """Run the judge with the profile's Python for it, else with the one for caption, which has vLLM."""
    pythons = launch.profile.python
    if "caption" in pythons:
        launch.profile = replace(launch.profile, python={JUDGE: pythons["caption"], **pythons})


def describe_memory(launch: Launch, request: Request) -> str:
    """Return the number of images and shards, and the memory that their distances need."""
    from pixart.evaluation.extractor_names import parse
    from pixart.evaluation.statistics import memory_bytes

    images = f"{len(request.variants) * request.num_images:,} images in {request.num_samples} shards"
    dim = parse(launch.recipe.evaluation.features).dim
    if request.reference["kind"] == "none" or dim is None:
        return f"evaluation: {images}"
    sampled = max(request.num_images, request.reference["count"])
    needed = memory_bytes(dim, launch.recipe.evaluation.num_sampled_features, sampled) / GIB
    return f"evaluation: {images}; the distances need {needed:.2f} GiB of memory for features of width {dim}"


def describe_results(folder: Path) -> str:
    """Return the figures of each variant, one line each."""
    results = inputs.read_results(folder)
    lines = []
    for variant in results["variants"]:
        figures = "; ".join(
            f"{name} {figure['value']:.4g} ({figure['low']:.4g} to {figure['high']:.4g})"
            for name, figure in variant["figures"].items()
        )
        settings = f"{variant['weights']}, {variant['steps']} steps, guidance {variant['guidance']:g}"
        lines.append(f"step {variant['step']}, {settings}: {figures or 'no figures'}")
        lines += remarks(variant["figures"])
        if variant["judged_by"]:
            lines.append(f"judged by {variant['judged_by']}; {variant['not_judged']} questions not judged")
    return "\n".join(lines)


COMMAND = Command(Options, run)
