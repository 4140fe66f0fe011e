"""Serve a checkpoint: OpenAI's images API and a page, on this machine or as a Slurm job.

On this machine the server runs until Ctrl-C. On Slurm, `status` shows the ssh command that leads to it, and its bearer
token (PIXART_SERVE_TOKEN sets another); it ends when no image was requested for --idle-minutes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.commands.hints import describe_submission
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, RecipeOptions, SubmissionOptions, argument, non_negative, option, positive
from jobs.commands.results.components import base_latent_size, open_components
from jobs.commands.results.serving import ServingRequest, find_source, follow, submit_serving, write_lineage
from jobs.state import run as runs
from jobs.state.checkpoint_names import INFERENCE
from jobs.submission.launch import Launch
from jobs.tasks.sample import guidance_warning

MAX_PORT = 65_535


def port_number(text: str) -> int:
    """Return a port. Raises ValueError unless it is an integer from 0 to MAX_PORT."""
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_PORT:
        raise ValueError(f"{text!r} is not a port; it must be 0 to {MAX_PORT}")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions, SubmissionOptions):
    """The options of `serve`."""

    checkpoint: str = argument(
        "CHECKPOINT",
        help="Checkpoint directory, run folder, FP8 export (inference/), any checkpoint that `convert` reads, or a "
        "released model, models:/NAME/VERSION.",
    )
    vae: str | None = option(
        "--vae", metavar="MODEL", help="VAE by folder or hub name, to serve without a dataset (default: the dataset's)."
    )
    text_encoder: str | None = option(
        "--text-encoder",
        metavar="MODEL",
        help="Text encoder by folder or hub name, to serve without a dataset (default: the dataset's).",
    )
    ignore_unknown: bool = option(
        "--ignore-unknown",
        default=False,
        help="Read a checkpoint of another program without the parts that look like training state and are not "
        "understood (default: refuse it).",
    )
    weights: tuple[Literal["ema", "master", "fp8"], ...] = option(
        "--weights",
        metavar="WEIGHTS",
        default=(),
        help="Weights that requests may choose: ema, master or fp8 (the FP8 export); the first is their default; "
        "repeatable (default: fp8 and ema with GPUs and an FP8 export, else ema).",
    )
    host: str | None = option(
        "--host",
        metavar="ADDRESS",
        help="Address to listen on; any but the loopback address needs a bearer token (default: 127.0.0.1, and all "
        "addresses of the node on Slurm).",
    )
    port: int | None = option(
        "--port", metavar="PORT", convert=port_number, help="Port, or 0 for a free one (default: 8000, and 0 on Slurm)."
    )
    idle_minutes: float | None = option(
        "--idle-minutes",
        metavar="MINUTES",
        convert=non_negative,
        help="End when no image was requested for this time; 0 is never (default: 0, and 30 on Slurm).",
    )
    max_batch_size: int | None = option(
        "--max-batch-size",
        metavar="IMAGES",
        convert=positive,
        help="Images that are denoised at once; with 1, each has exactly the bits of `sample` (default: 16).",
    )
    max_queue: int | None = option(
        "--max-queue",
        metavar="IMAGES",
        convert=positive,
        help="Images that may wait; requests beyond are answered by 429 (default: 64).",
    )
    max_images: int | None = option(
        "--max-images", metavar="N", convert=positive, help="Largest n of a request (default: 8)."
    )
    max_seconds: int | None = option(
        "--max-seconds",
        metavar="SECONDS",
        convert=positive,
        help="Longest time until a request is answered (default: 300).",
    )
    recaption_server: str | None = option(
        "--recaption-server",
        metavar="URL",
        help="Running OpenAI-compatible server that rewrites prompts, such as http://node:8000/v1 (default: none).",
    )
    recaption_model: str | None = option(
        "--recaption-model",
        metavar="MODEL",
        help="Model that rewrites prompts, by folder or hub name, with a vLLM server that is started beside; or a "
        "model of --recaption-server (default: none, or the server's).",
    )
    content_check: bool = option(
        "--content-check",
        default=False,
        help="Withhold images in which a classifier finds explicit content; needs the extra content-check (default: "
        "send all images).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    with launching("serve", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        serve(launch, options)
    return 0


def serve(launch: Launch, options: Options) -> None:
    """Check the options against the checkpoint and the dataset, and submit the server; on this machine, wait for it."""
    request = make_request(launch, options)
    run = submit_serving(launch, request)
    write_lineage(launch.home, run, request.checkpoint)
    if launch.wait:
        print(follow(launch, run))
    else:
        print(describe_submission(options, run))


def make_request(launch: Launch, options: Options) -> ServingRequest:
    """Return what to serve, and set the recipe's `data`, as `sample` does.

    Raises ValueError if the options do not fit each other, the checkpoint or the dataset.
    """
    checkpoint, record = find_source(launch.home, options.checkpoint)
    open_components(launch, options, checkpoint, record)
    if record and (warning := guidance_warning(checkpoint, record, launch.recipe.sample.guidance)):
        print(warning, file=sys.stderr)
    is_slurm = launch.profile.executor == "slurm"
    limits = {
        "batch_size": options.max_batch_size,
        "queued_images": options.max_queue,
        "images": options.max_images,
        "request_seconds": options.max_seconds,
    }
    return ServingRequest(
        checkpoint=checkpoint,
        weights=choose_weights(checkpoint, options.weights, has_gpu=launch.profile.gpus_per_node > 0),
        host=options.host or ("0.0.0.0" if is_slurm else "127.0.0.1"),
        port=options.port if options.port is not None else 0 if is_slurm else 8000,
        idle_minutes=options.idle_minutes if options.idle_minutes is not None else 30.0 if is_slurm else 0.0,
        limits={name: value for name, value in limits.items() if value is not None},
        recaption_server=options.recaption_server,
        recaption_model=options.recaption_model,
        content_check=options.content_check,
        base_latent_size=base_latent_size(launch, options),
        ignore_unknown=options.ignore_unknown,
    )


def choose_weights(checkpoint: Path, names: tuple[str, ...], *, has_gpu: bool) -> list[str]:
    """Return the names of the weights to load. Raises ValueError for weights that the checkpoint does not have."""
    is_export = (checkpoint / INFERENCE).exists()
    has_fp8 = is_export or (checkpoint / "inference" / INFERENCE).exists()
    available = [*(["fp8"] if has_fp8 else []), *([] if is_export else ["ema", "master"])]
    for name in names:
        if name not in available:
            raise ValueError(f"--weights {name}: {checkpoint} has none; it has {' and '.join(available)}")
    if names:
        return list(dict.fromkeys(names))
    return ["fp8"] if is_export else ["fp8", "ema"] if has_fp8 and has_gpu else ["ema"]


COMMAND = Command(Options, run)
