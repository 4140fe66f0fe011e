"""The worker: one thread that denoises the images of all jobs in one batch, and decodes them."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from pixart.sampling.pipeline import PixArtPipeline
from pixart.serving.denoising import Denoiser, Trajectory, noise_sigmas
from pixart.serving.jobs import Failed, Finished, Job, JobQueue, Preview
from pixart.serving.metrics import Metrics

logger = logging.getLogger(__name__)


class Engine:
    """The worker thread over the pipelines of a model, one for each set of weights.

    Images join the batch before a step as far as there are places, and leave it when they are finished or their job is
    cancelled. Those that begin together are encoded together.
    """

    def __init__(self, pipelines: Mapping[str, PixArtPipeline], queue: JobQueue, metrics: Metrics) -> None:
        self.pipelines, self.queue, self.metrics = pipelines, queue, metrics
        self.denoisers = {name: Denoiser(pipeline.transformer) for name, pipeline in pipelines.items()}
        self.active: list[tuple[Job, int, Trajectory]] = []
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.begun = time.monotonic()  # of the time since images were last finished, or since the batch was empty

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Finish what runs, and end the thread."""
        self.queue.close()
        self.thread.join()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def run(self) -> None:
        """Serve jobs until the queue is closed and empty. An error fails the jobs of the batch, and no others."""
        while True:
            self.active = [entry for entry in self.active if not entry[0].is_cancelled]
            self.queue.record(len(self.active), 0, 0)
            key = self.active[0][0].key if self.active else None
            if key is None:
                self.begun = 0.0
            taken = self.queue.take(self.queue.limits.batch_size - len(self.active), key)
            if not taken and not self.active:
                return
            self.begun = self.begun or time.monotonic()
            try:
                self.active += self.begin(taken)
                self.step()
            except Exception as error:
                logger.exception("a batch of %d images failed", len(self.active))
                for job in {
                    id(job): job for job, _ in [*taken, *((job, index) for job, index, _ in self.active)]
                }.values():
                    self.queue.cancel(job)
                    job.notify(Failed(error))
                self.active = []

    def begin(self, taken: Sequence[tuple[Job, int]]) -> list[tuple[Job, int, Trajectory]]:
        """Return the trajectories of images at their noise, with the conditioning of their prompts."""
        if not taken:
            return []
        pipeline = self.pipelines[taken[0][0].request.weights]
        prompts = list(dict.fromkeys(job.prompt for job, _ in taken))
        is_text = pipeline.transformer.stage == 2
        classes = [] if is_text else [class_of(pipeline, prompt) for prompt in prompts]
        conditioning, null = pipeline.conditioning(prompts if is_text else None, None if is_text else classes, 1)
        shape = (pipeline.transformer.config.in_dim, *pipeline.default_latent_size)
        trajectories = []
        for job, index in taken:
            row = prompts.index(job.prompt)
            request = job.request
            generator = torch.Generator().manual_seed(request.seed + index)
            trajectories.append(
                Trajectory(
                    latents=torch.randn(shape, generator=generator).to(pipeline.transformer.device),
                    conditioning={name: value[row : row + 1] for name, value in conditioning.items()},
                    null_conditioning={name: value[row : row + 1] for name, value in null.items()},
                    sigmas=noise_sigmas(pipeline.scheduler, request.steps),
                    guidance=request.guidance,
                    preview_steps=preview_steps(request.steps, request.partial_images),
                )
            )
        return [(job, index, trajectory) for (job, index), trajectory in zip(taken, trajectories, strict=True)]

    def step(self) -> None:
        """Take one step of all images, and send previews and finished images to their jobs."""
        weights, begun = self.active[0][0].request.weights, time.perf_counter()
        pipeline = self.pipelines[weights]
        self.denoisers[weights].advance([trajectory for *_, trajectory in self.active])
        finished = [entry for entry in self.active if entry[2].is_finished]
        previews = [entry for entry in self.active if entry[2].step - 1 in entry[2].preview_steps]
        images = decode(pipeline, [trajectory.latents for *_, trajectory in (*finished, *previews)])
        self.active = [entry for entry in self.active if not entry[2].is_finished]
        for (job, index, trajectory), image in zip(finished, images, strict=False):
            job.notify(Finished(index, image, trajectory.largest_batch))
        for (job, index, trajectory), image in zip(previews, images[len(finished) :], strict=True):
            job.notify(Preview(index, trajectory.step - 1, image))
        self.metrics.batch_size.observe(len(self.active) + len(finished))
        self.metrics.step_seconds.observe(time.perf_counter() - begun)
        if finished:
            self.metrics.images.inc(len(finished))
            self.queue.record(len(self.active), len(finished), time.monotonic() - self.begun)
            self.begun = time.monotonic()


def class_of(pipeline: PixArtPipeline, name: str) -> int | str:
    """Return a class by its name, or by its index if no class has this name."""
    return name if not name.isdecimal() or name in pipeline.config.id2label.values() else int(name)


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """Return the steps, counted from 0, after which an image is decoded: `count` evenly spaced ones before the last."""
    count = min(count, steps - 1)
    return frozenset((number + 1) * steps // (count + 1) - 1 for number in range(count))


def decode(pipeline: PixArtPipeline, latents: Sequence[Tensor]) -> list[Image.Image]:
    """Return the images of normalized latents, each (C, h, w)."""
    return pipeline.decode_latents(torch.stack(list(latents))) if latents else []
