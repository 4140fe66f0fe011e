"""Sample images from a checkpoint, or export a diffusers pipeline.

Stage 1 samples classes (--class), stage 2 prompts (--prompt, --file). The keys sample.* set the steps, the guidance,
the seed and how many captions of the dataset are sampled.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jobs.commands.data.recaption import print_problems, rewrite_by_server, submit_recaption
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, RecipeOptions, SubmissionOptions, argument, option, positive
from jobs.commands.results.components import base_latent_size, check_sizes, open_components
from jobs.commands.results.sampling import SamplingRequest, describe_samples, submit_sampling
from jobs.commands.results.sampling_checks import class_index
from jobs.state import run as runs
from jobs.state.checkpoint_names import INFERENCE, find_weights
from jobs.state.prompts import read_prompts
from jobs.submission.launch import Launch
from jobs.submission.wait import dependencies
from jobs.tasks.sample import guidance_warning
from pixart.config.aspect_buckets import Shape
from pixart.config.resolutions import parse_size


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, SubmissionOptions):
    """The options of `sample`."""

    checkpoint: str = argument(
        "CHECKPOINT",
        help="Checkpoint directory, run folder, FP8 export (inference/), or any checkpoint that `convert` reads.",
    )
    vae: str | None = option(
        "--vae",
        metavar="MODEL",
        help="VAE by folder or hub name, to sample without a dataset (default: the dataset's).",
    )
    text_encoder: str | None = option(
        "--text-encoder",
        metavar="MODEL",
        help="Text encoder by folder or hub name, to sample without a dataset (default: the dataset's).",
    )
    ignore_unknown: bool = option(
        "--ignore-unknown",
        default=False,
        help="Read a checkpoint of another program without the parts that look like training state and are not "
        "understood (default: refuse it).",
    )
    prompts: tuple[str, ...] = option(
        "--prompt",
        metavar="TEXT",
        default=(),
        convert=str,
        help="Prompt, for stage 2; repeatable (default: captions of the dataset).",
    )
    file: str | None = option(
        "--file",
        metavar="FILE",
        help='File with more prompts, one per line; of a .jsonl file the field "text" or "prompt" (default: none).',
    )
    classes: tuple[str, ...] = option(
        "--class",
        metavar="NAME|INDEX",
        default=(),
        convert=str,
        help="Class, for stage 1; none is the null class; repeatable (default: the first classes, one image each).",
    )
    images_per_prompt: int = option(
        "--per-prompt",
        metavar="N",
        default=1,
        convert=positive,
        help="Number of images of each prompt or class, with consecutive seeds from sample.seed on (default: 1).",
    )
    sizes: tuple[Shape, ...] = option(
        "--size",
        metavar="WIDTHxHEIGHT",
        default=(),
        convert=parse_size,
        help="Size of the images in pixels; repeatable, and every prompt is sampled at each (default: of the sizes "
        "that the checkpoint was trained at, the nearest to a square).",
    )
    force_size: bool = option(
        "--force-size",
        default=False,
        help="Allow a --size that the checkpoint was not trained at (default: refuse it).",
    )
    weights: Literal["ema", "master"] = option(
        "--weights", metavar="WEIGHTS", default="ema", help="Weights to use: ema or master (default: ema)."
    )
    recaption: bool = option(
        "--recaption",
        default=False,
        help="Rewrite the prompts in the style of the captions first (default: sample them unchanged).",
    )
    server: str | None = option(
        "--server", metavar="URL", help="Running vLLM server for --recaption (default: submit a job)."
    )
    model: str | None = option(
        "--model",
        metavar="MODEL",
        help="Model for --recaption, by folder or hub name (default: the recipe's captioner, or the server's).",
    )
    frames: bool = option(
        "--frames",
        default=False,
        help="Also write the image of each step and a GIF of them (default: only the final images).",
    )
    export_pipeline: str | None = option(
        "--export-pipeline",
        metavar="FOLDER",
        help="Write a diffusers pipeline, and sample only the prompts or classes that are given (default: no export).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    options = replace(options, checkpoint=runs.run_folder(home, options.checkpoint))
    with launching("sample", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(sample(launch, options))
    return 0


def sample(launch: Launch, options: Options) -> str:
    """Check the options against the checkpoint and the dataset, and submit the sampling."""
    request = make_request(launch, options)
    after: list[str] = []
    if options.recaption and not launch.dry_run:
        request, after = rewrite_prompts(launch, options, request)
    submitted = submit_sampling(launch, request, after=after)
    if not launch.wait:
        return describe_submission(options, submitted)
    following = next_command(options, "lineage", submitted.folder.name)
    return f"{describe_samples(runs.result(submitted))}\nnext: {following}"


def make_request(launch: Launch, options: Options) -> SamplingRequest:
    """Return what to sample, and set the recipe's `data` to the dataset, or to the models that the options name.

    Raises ValueError if the options do not fit each other, the checkpoint or the dataset, as far as that can be checked
    without torch.
    """
    checkpoint, record = find_weights(options.checkpoint)
    is_inference = (checkpoint / INFERENCE).exists()
    check_options(options, checkpoint, record["stage"] if record else None, is_inference)
    class_names, num_classes = open_components(launch, options, checkpoint, record)
    check_sizes(options.sizes, launch.recipe.data, checkpoint, record, force=options.force_size)
    if record and (warning := guidance_warning(checkpoint, record, launch.recipe.sample.guidance)):
        print(warning, file=sys.stderr)
    prompts = [{"prompt": text} for text in options.prompts] + (read_prompts(options.file) if options.file else [])
    if options.recaption and not prompts:
        raise ValueError("--recaption rewrites prompts; give --prompt or --file")
    return SamplingRequest(
        checkpoint=checkpoint,
        prompts=prompts,
        classes=[class_index(name, class_names, num_classes) for name in options.classes],
        images_per_prompt=options.images_per_prompt,
        weights=options.weights,
        base_latent_size=base_latent_size(launch, options),
        ignore_unknown=options.ignore_unknown,
        frames=options.frames,
        sizes=options.sizes,
        export=Path(options.export_pipeline).absolute() if options.export_pipeline else None,
    )


def rewrite_prompts(launch: Launch, options: Options, request: SamplingRequest) -> tuple[SamplingRequest, list[str]]:
    """Return the request with rewritten prompts, or with the file that a job writes them to and the job's id."""
    texts = [item["prompt"] for item in request.prompts]
    if options.server:
        rewritten = rewrite_by_server(launch, texts, options.server, options.model)
        print_problems(rewritten)
        prompts = [{"prompt": item["text"], "request": item["request"]} for item in rewritten]
        return replace(request, prompts=prompts), []
    job = submit_recaption(launch, texts, options.model)
    if launch.wait:
        print_problems(runs.result(job))
    return replace(request, rewritten=job.folder / "rewritten.jsonl"), dependencies(launch, job)


def check_options(options: Options, checkpoint: Path, stage: int | None, is_inference: bool) -> None:
    """Check the options; the stage is None if it is not known.

    Raises ValueError if some exclude each other or do not fit the checkpoint.
    """
    by_text = {"--prompt": options.prompts, "--file": options.file, "--recaption": options.recaption}
    text_flag = next((flag for flag, value in by_text.items() if value), None)
    if stage == 1 and text_flag:
        raise ValueError(f"{text_flag}: {checkpoint} is a checkpoint of stage 1, which samples classes; give --class")
    if stage == 2 and options.classes:
        raise ValueError(f"--class: {checkpoint} is a checkpoint of stage 2, which samples prompts; give --prompt")
    for flag, value in (("--server", options.server), ("--model", options.model)):
        if value and not options.recaption:
            raise ValueError(f"{flag}: needs --recaption; give both, or neither")
    if len(set(options.sizes)) < len(options.sizes):
        raise ValueError("--size: a size is given twice; give each once")
    if options.force_size and not options.sizes:
        raise ValueError("--force-size: needs --size; give both, or neither")
    if is_inference and options.weights != "ema":
        raise ValueError(f"--weights {options.weights}: {checkpoint} has only EMA weights; give --weights ema")
    if options.export_pipeline:
        check_export(options.export_pipeline, checkpoint, is_inference)


def check_export(folder: str, checkpoint: Path, is_inference: bool) -> None:
    """Check the folder of the export. Raises ValueError if the checkpoint cannot be exported to it."""
    if is_inference:
        raise ValueError(
            f"--export-pipeline: {checkpoint} is in FP8, which diffusers cannot read; give the training checkpoint"
        )
    if Path(folder).exists():
        raise ValueError(f"--export-pipeline {folder}: exists; name a new folder")
    if any(parent.is_file() for parent in Path(folder).absolute().parents):
        raise ValueError(f"--export-pipeline {folder}: lies below a file; name a new folder")


COMMAND = Command(Options, run)
