"""The sampling job: its request, its submission and the description of its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.submit import run_ranks
from pixart.config.aspect_buckets import Shape
from slurm.executor import Cluster


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRequest:
    """What to sample. Without prompts and classes, the job takes captions or classes of the dataset."""

    checkpoint: Path
    prompts: Sequence[dict[str, str]] = ()  # prompt, and request if it was rewritten
    classes: Sequence[int] = ()
    images_per_prompt: int = 1
    weights: str = "ema"
    rewritten: Path | None = None  # file that an earlier job writes the prompts to
    export: Path | None = None  # folder of a diffusers pipeline
    base_latent_size: int | None = None  # of a checkpoint that does not record it
    ignore_unknown: bool = False  # whether to read a checkpoint without parts that are not understood
    frames: bool = False  # whether to write the image of each step
    sizes: Sequence[Shape] = ()  # of the images; the default of the checkpoint if empty


def submit_sampling(launch: Launch, request: SamplingRequest, after: Sequence[str] = ()) -> Run:
    """Submit the job, to start when the jobs of `after` have succeeded."""
    config = launch.recipe.sample
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("sample", 1, 1),
        {
            "checkpoint": str(request.checkpoint),
            "prompts": [] if request.rewritten else list(request.prompts),
            "classes": list(request.classes),
            "per_prompt": request.images_per_prompt,
            "weights": request.weights,
            "rewritten": str(request.rewritten) if request.rewritten else None,
            "export": str(request.export) if request.export else None,
            "base_latent_size": request.base_latent_size,
            "ignore_unknown": request.ignore_unknown,
            "frames": request.frames,
            "sizes": [list(size) for size in request.sizes],
        },
        parameters={
            "checkpoint": str(request.checkpoint),
            "weights": request.weights,
            **{name: getattr(config, name) for name in ("steps", "guidance", "seed")},
        },
        tags={"pixart.parent_checkpoint": str(request.checkpoint)},
        total=(len(request.prompts) or len(request.classes) or config.count)
        * request.images_per_prompt
        * max(1, len(request.sizes)),
        after=after,
    )


def describe_samples(result: dict[str, Any]) -> str:
    """Return the lines that the launcher prints about a finished sampling job."""
    lines = [result["warning"]] if result.get("warning") else []
    lines += [f"sampled: {result['sheet']}"] if "sheet" in result else []
    if "color" in result:
        lines.append(
            f"accuracy: main color right in {result['color']:.0%}, main shape in {result['shape']:.0%} "
            f"of {result['prompts']} prompts that are not in the training data"
        )
    if result["export"]:
        lines.append(f"exported: {result['export']}")
    return "\n".join(lines)
