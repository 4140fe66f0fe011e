"""Jobs of clients, and the bounded queue in which their images wait for a place in the batch."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from PIL import Image

from pixart.serving.requests import ImageRequest, Limits

MAX_RETRY_SECONDS = 60
RATE_DECAY = 0.9  # of the moving average of the seconds per image


class QueueFullError(Exception):
    """The queue has no place; the client should try again after `retry_seconds`."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


class DrainingError(Exception):
    """The server ends, and accepts no further jobs."""


@dataclass(frozen=True, slots=True)
class Preview:
    """The decoded latents of an image after a step, counted from 0."""

    index: int
    step: int
    image: Image.Image


@dataclass(frozen=True, slots=True)
class Finished:
    """An image, and the largest number of images that it shared a batch with, itself included."""

    index: int
    image: Image.Image
    batch_size: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a job without further images."""

    error: Exception


Event = Preview | Finished | Failed


@dataclass(kw_only=True, eq=False)
class Job:
    """The images of one request. `notify` is called from the worker's thread."""

    request: ImageRequest
    prompt: str  # that is sampled: the request's, or the rewritten one
    notify: Callable[[Event], object]
    is_cancelled: bool = False
    waiting: deque[int] = field(default_factory=deque)  # indices of the images that have not begun

    def __post_init__(self) -> None:
        self.waiting.extend(range(self.request.n))

    @property
    def key(self) -> tuple[str, tuple[int, int]]:
        """The weights and the image size, which all images of a batch share."""
        return self.request.weights, self.request.size


class JobQueue:
    """A bounded queue, first come, first served, of the images of all jobs.

    A job that cannot join the current batch, because of other weights or another size, waits until that has ended, and
    those behind it wait too: none waits forever.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.is_draining = self.is_closed = False
        self.num_active = 0  # images in the batch, which the worker sets
        self.seconds_per_image = 0.0
        self.last_used = time.monotonic()

    @property
    def num_waiting(self) -> int:
        """Number of images that have not begun."""
        with self.changed:
            return sum(len(job.waiting) for job in self.jobs)

    @property
    def is_idle(self) -> bool:
        """Whether no image waits or is being made."""
        with self.changed:
            return not self.num_active and not self.jobs

    def put(self, job: Job) -> None:
        """Add a job. Raises QueueFullError if its images exceed the limit, DrainingError if the server ends.

        A job is accepted whole; an empty queue accepts every job.
        """
        with self.changed:
            self.last_used = time.monotonic()
            if self.is_draining:
                raise DrainingError
            if self.jobs and self.num_waiting + len(job.waiting) > self.limits.queued_images:
                raise QueueFullError(self.retry_seconds())
            self.jobs.append(job)
            self.changed.notify_all()

    def retry_seconds(self) -> int:
        """Return the seconds until half of the waiting images have probably begun."""
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(self.num_waiting * self.seconds_per_image / 2)))

    def cancel(self, job: Job) -> None:
        """Remove a job from the queue; its images in the batch leave it before the next step."""
        with self.changed:
            job.is_cancelled = True
            if job in self.jobs:
                self.jobs.remove(job)
            self.changed.notify_all()

    def take(self, count: int, key: object | None) -> list[tuple[Job, int]]:
        """Return up to `count` images with a key that may begin now.

        Without a key, which means that no batch runs, waits for a job; then an empty list means that the queue is
        closed.
        """
        with self.changed:
            while key is None and not self.jobs and not self.is_closed:
                self.changed.wait()
            taken: list[tuple[Job, int]] = []
            while self.jobs and len(taken) < count and self.jobs[0].key == (key or self.jobs[0].key):
                job = self.jobs[0]
                key = job.key
                taken.append((job, job.waiting.popleft()))
                if not job.waiting:
                    self.jobs.popleft()
            self.num_active += len(taken)
            return taken

    def record(self, num_active: int, num_finished: int, seconds: float) -> None:
        """Record the images in the batch after a step, and the seconds per image that the finished ones took."""
        with self.changed:
            self.num_active = num_active
            if num_finished:
                rate = seconds / num_finished
                self.seconds_per_image = (
                    RATE_DECAY * self.seconds_per_image + (1 - RATE_DECAY) * rate if self.seconds_per_image else rate
                )
            self.last_used = time.monotonic()

    def drain(self) -> None:
        """Accept no further jobs, and fail those of which no image has begun; the others are finished."""
        with self.changed:
            self.is_draining = True
            waiting = [job for job in self.jobs if len(job.waiting) == job.request.n]
            for job in waiting:
                self.jobs.remove(job)
        for job in waiting:
            job.notify(Failed(DrainingError()))

    def close(self) -> None:
        """End the worker once no job is left."""
        self.drain()
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
