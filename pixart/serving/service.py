"""The parts of a running server that its routes share, and a client's view of its job."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pixart.sampling.images import SampleRequest
from pixart.sampling.pipeline import NULL_CLASS, PixArtPipeline
from pixart.serving.content_check import ContentError
from pixart.serving.engine import Engine, class_of
from pixart.serving.jobs import Event, Failed, Finished, Job, JobQueue, Preview
from pixart.serving.metrics import Metrics
from pixart.serving.provenance import encode_png
from pixart.serving.recaptioning import Recaptioner
from pixart.serving.requests import ImageRequest, Limits, ServedModel

Describe = Callable[[str, dict[str, str]], dict[str, str]]


@dataclass(kw_only=True, eq=False)
class Service:
    """A model that is served, its worker and what else the routes need.

    `describe` returns the metadata of a PNG for the weights and the settings of its image. `lineage` is a file with the
    page of the model's lineage, which may be written after the start.
    """

    model: ServedModel
    pipelines: Mapping[str, PixArtPipeline]
    describe: Describe
    limits: Limits = field(default_factory=Limits)
    recaptioner: Recaptioner | None = None
    is_allowed: Callable[[Image.Image], bool] | None = None
    lineage: Path | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.queue = JobQueue(self.limits)
        self.engine = Engine(self.pipelines, self.queue, self.metrics)
        self.created = int(time.time())
        self.stored: OrderedDict[str, bytes] = OrderedDict()

    def store(self, png: bytes) -> str:
        """Keep a PNG, and return its name, which cannot be guessed; the oldest ones beyond the limit are dropped."""
        name = secrets.token_urlsafe(24)
        self.stored[name] = png
        while len(self.stored) > self.limits.stored_images:
            self.stored.popitem(last=False)
        return name

    async def png(self, request: ImageRequest, prompt: str, finished: Finished) -> bytes:
        """Return a finished image as PNG with its metadata. Raises ContentError if the content check withholds it."""
        await self.check_content(finished.image)
        settings = sample_request(self.pipelines[request.weights], request, prompt, finished.index).settings()
        settings |= {"steps": str(request.steps), "guidance": str(request.guidance)}
        settings |= {"size": f"{finished.image.width}x{finished.image.height}", "batch_size": str(finished.batch_size)}
        return await asyncio.to_thread(encode_png, finished.image, self.describe(request.weights, settings))

    async def check_content(self, image: Image.Image) -> None:
        """Raise ContentError if the content check withholds an image."""
        if self.is_allowed and not await asyncio.to_thread(self.is_allowed, image):
            raise ContentError("an image was withheld by the content check; change the prompt or the seed")


def sample_request(pipeline: PixArtPipeline, request: ImageRequest, prompt: str, index: int) -> SampleRequest:
    """Return the request of image `index` as `sample` describes it."""
    seed = request.seed + index
    if pipeline.transformer.stage == 1:
        label = pipeline.class_index(class_of(pipeline, prompt))
        is_null = label == pipeline.transformer.config.num_classes - 1
        name = NULL_CLASS if is_null else pipeline.config.id2label.get(str(label), str(label))
        return SampleRequest(seed=seed, label=label, class_name=name)
    return SampleRequest(seed=seed, prompt=prompt, request=request.prompt if prompt != request.prompt else "")


async def events(
    service: Service, request: ImageRequest, prompt: str, deadline: float
) -> AsyncGenerator[Preview | Finished, None]:
    """Submit a job and yield its events until all images are finished; leaving the iteration cancels the job.

    Raises the error of a failed job, QueueFullError, DrainingError, and TimeoutError at the deadline, in seconds of the
    event loop's clock.
    """
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[Event]()
    job = Job(request=request, prompt=prompt, notify=lambda event: loop.call_soon_threadsafe(arrived.put_nowait, event))
    service.queue.put(job)
    remaining = request.n
    try:
        while remaining:
            async with asyncio.timeout_at(deadline):
                event = await arrived.get()
            if isinstance(event, Failed):
                raise event.error
            remaining -= isinstance(event, Finished)
            yield event
    except asyncio.CancelledError:
        service.metrics.cancelled.inc()
        raise
    finally:
        service.queue.cancel(job)
