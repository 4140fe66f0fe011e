"""The serve job: an HTTP server of a checkpoint's images until it is idle or ended."""

import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.state import endpoint as endpoints
from jobs.state.checkpoint_names import INFERENCE, find_weights
from jobs.state.endpoint import Endpoint
from jobs.state.journal import Journal
from jobs.tasks import sample
from pixart.config import recipe as recipe_file
from pixart.config.recipe import Recipe

logger = logging.getLogger(__name__)
LINEAGE = "lineage.html"  # page of the checkpoint's lineage in the run folder, which the launcher writes
TOKEN_VARIABLE = "PIXART_SERVE_TOKEN"
DRAIN_SECONDS = 25.0  # below the 30 s (KillWait) that Slurm leaves a job between SIGTERM and SIGKILL
FP8 = "fp8"  # weights of the FP8 export for inference


def run(
    run_folder: str,
    *,
    checkpoint: str,
    weights: list[str],
    host: str,
    port: int,
    idle_minutes: float,
    limits: dict[str, Any],
    recaption_server: str | None = None,
    recaption_model: str | None = None,
    recaption_python: str | None = None,
    content_check: bool = False,
    base_latent_size: int | None = None,
    ignore_unknown: bool = False,
) -> dict[str, Any]:
    """Serve until no image was requested for `idle_minutes` (0: forever), or a signal ends the job.

    Then no further request is accepted, and the images that have begun are finished. The endpoint is a file in the run
    folder while the server runs. Returns why it ended and the number of images; raises TaskInterrupted if the job is
    terminated, and ValueError if the checkpoint cannot be read or the address not be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    from pixart.serving import recaptioning
    from pixart.serving.content_check import make_content_check
    from pixart.serving.requests import Limits
    from pixart.serving.server import open_socket, serve
    from pixart.serving.service import Service
    from slurm.task import TERMINATE, TaskInterrupted, stop_level

    folder = Path(run_folder)
    configuration = recipe_file.load(folder / "config.json")
    path, _ = find_weights(checkpoint)
    listener = open_socket(host, port)
    options = {"base_latent_size": base_latent_size, "ignore_unknown": ignore_unknown}
    pipelines, describe = load_pipelines(folder, path, weights, configuration, options)
    allowed, is_allowed = Limits(**limits), make_content_check() if content_check else None
    endpoint = make_endpoint(host, listener.getsockname()[1])
    captions, seconds = configuration.data.captions, allowed.request_seconds
    recaptioner, vllm = None, None
    if recaption_server:
        recaptioner = recaptioning.by_server(captions, recaption_server, recaption_model, seconds=seconds)
    elif recaption_model:
        assert recaption_python
        log = folder / "logs" / "vllm.log"
        vllm = recaptioning.VllmServer(recaption_python, recaption_model, captions, log)
        recaptioner = recaptioning.by_vllm(captions, vllm, seconds=seconds)
    service = Service(
        model=served_model(path, pipelines, configuration, recaptioner is not None),
        pipelines=pipelines,
        describe=describe,
        limits=allowed,
        recaptioner=recaptioner,
        is_allowed=is_allowed,
        lineage=folder / LINEAGE,
    )
    try:
        reason = serve(
            service,
            listener,
            token=endpoint.token,
            should_stop=stop_level,
            idle_seconds=60 * idle_minutes,
            drain_seconds=DRAIN_SECONDS,
            on_ready=lambda: endpoint.save(folder),
        )
    finally:
        (folder / endpoints.FILE).unlink(missing_ok=True)
        if vllm:
            vllm.stop()
    images = int(service.metrics.registry.get_sample_value("pixart_images_total") or 0)
    Journal(folder).metrics(images, {"serve/images": images})
    if stop_level() == TERMINATE:
        raise TaskInterrupted(TERMINATE)
    return {"ended": reason, "images": images}


def make_endpoint(host: str, port: int) -> Endpoint:
    """Return the endpoint of this job.

    It has a token where others can reach the server: at an address of the network, or on a node that a cluster's users
    share. The token is the user's from the environment, or a random one.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if not token and (host not in endpoints.LOOPBACK or "SLURM_JOB_ID" in os.environ):
        token = secrets.token_urlsafe(24)
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    return Endpoint(node=node, host=host, port=port, token=token or None, job=job)


def load_pipelines(
    folder: Path, checkpoint: Path, names: list[str], configuration: Recipe, options: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[str, dict[str, str]], dict[str, str]]]:
    """Return the pipeline of each set of weights (ema, master or fp8), and a function that completes PNG metadata.

    The function takes the name of the weights and the settings of an image, and adds the provenance and the command, as
    `sample` does. `options` are those of `sample.load_weights`.
    """
    pipelines: dict[str, Any] = {}
    provenance: dict[str, dict[str, str]] = {}
    for name in names:
        path = checkpoint / "inference" if name == FP8 and not (checkpoint / INFERENCE).exists() else checkpoint
        weights = "ema" if name == FP8 else name
        model, record = sample.load_weights(path, weights, **options)
        pipeline, sources = sample.open_pipeline(model, record, configuration, path, export=False)
        pipelines[name] = pipeline.to(pipeline.vae.device)
        provenance[name] = {**sample.origin(folder, model.stage, record, path, weights), **sources}

    def describe(weights: str, settings: dict[str, str]) -> dict[str, str]:
        return sample.with_command({**settings, **provenance[weights]})

    return pipelines, describe


def served_model(checkpoint: Path, pipelines: dict[str, Any], configuration: Recipe, recaption: bool) -> Any:
    """Return the model as clients see it; decoding an empty latent gives the size of its images."""
    import torch

    from pixart.serving.requests import ServedModel

    pipeline = next(iter(pipelines.values()))
    config = pipeline.transformer.config
    (image,) = pipeline.decode_latents(torch.zeros(1, config.in_dim, *pipeline.default_latent_size))
    in_run = checkpoint.parent.name == "checkpoints"
    names = pipeline.config.id2label
    return ServedModel(
        name=f"{checkpoint.parent.parent.name}/{checkpoint.name}" if in_run else checkpoint.name,
        stage=pipeline.transformer.stage,
        size=image.size,
        steps=configuration.sample.steps,
        guidance=configuration.sample.guidance,
        weights=tuple(pipelines),
        classes=tuple(names[key] for key in sorted(names, key=int)),
        num_classes=config.num_classes,
        recaption=recaption,
    )
