"""Metrics of a server for Prometheus, in a registry of each app."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "pixart_requests", "Requests for images, by HTTP status.", ["status"], registry=self.registry
        )
        self.images = Counter("pixart_images", "Images that were finished.", registry=self.registry)
        self.cancelled = Counter(
            "pixart_cancelled_requests", "Requests whose client left before the answer.", registry=self.registry
        )
        self.waiting = Gauge("pixart_waiting_images", "Images in the queue.", registry=self.registry)
        self.active = Gauge("pixart_active_images", "Images in the batch.", registry=self.registry)
        self.batch_size = Histogram(
            "pixart_batch_size", "Images in the batch, by step.", buckets=BATCH_SIZES, registry=self.registry
        )
        self.step_seconds = Histogram(
            "pixart_step_seconds", "Duration of a denoising step, in seconds.", buckets=SECONDS, registry=self.registry
        )
        self.request_seconds = Histogram(
            "pixart_request_seconds", "Duration of a request for images.", buckets=SECONDS, registry=self.registry
        )

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
