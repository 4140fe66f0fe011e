"""Metrics of a run: loss curves, throughput, loss spikes, FP8 scales."""

import logging
import os
import resource
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pixart.config.model import ModelConfig
from pixart.config.model_costs import training_operations
from pixart.data.loading.loader import Batch
from pixart.data.loading.order import TrainingOrder
from pixart.gpu_rates import peak_tflops
from pixart.model.fp8 import scaling
from pixart.training.optimizer import learning_rate
from pixart.training.trainer import Trainer

SPIKE_THRESHOLD = 6.0  # standard deviations above the mean of the previous losses
SPIKE_WINDOW = 200  # previous losses, at most
MIN_SPIKE_WINDOW = 20
GIB = 1 << 30
logger = logging.getLogger(__name__)


class Reporter(Protocol):
    """Receiver of a run's metrics, incidents and files; used on rank 0 only."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record metrics by name after `step` optimizer steps."""
        ...

    def incident(self, step: int, text: str) -> None:
        """Record an incident after `step` optimizer steps, such as a loss spike, as one line of text."""
        ...

    def artifact(self, file: Path) -> None:
        """Record a file of the run, such as a preview image."""
        ...


class NullReporter:
    """Reporter that discards everything."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def incident(self, step: int, text: str) -> None:
        pass

    def artifact(self, file: Path) -> None:
        pass


class DivergedError(Exception):
    """Too many consecutive steps had gradients that are not finite."""


class MetricsLogger:
    """Collects the metrics of an interval of steps without synchronizing with the device, and logs them."""

    def __init__(self, trainer: Trainer, order: TrainingOrder, reporter: Reporter) -> None:
        self.trainer, self.order, self.reporter = trainer, order, reporter
        self.config, self.ranks = trainer.config, trainer.ranks
        self.previous_losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        config, text_tokens = trainer.metadata().config, trainer.dataset.data.max_text_tokens
        sizes, text_dim = ModelConfig.of_checkpoint(config), config.get("text_dim") or 0
        # By formula: PyTorch's counter takes more than a second for each shape of a large model.
        self.flops_per_image = {
            (height, width): training_operations(sizes, trainer.stage, height * width, text_tokens, text_dim).total
            for height, width in trainer.latent_sizes
        }
        precision = "fp8" if trainer.plan else self.config.precision
        cuda = self.ranks.device.type == "cuda"
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name(), precision) if cuda else None
        self.start_interval()

    def start_interval(self) -> None:
        """Discard what was collected and restart the clock."""
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []
        self.latent_sizes: list[tuple[int, int]] = []  # (height, width) of the latents of each step
        self.data_loading_seconds = 0.0
        self.start_time = time.perf_counter()

    def time_data_loading(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Iterate over batches and add up the time spent waiting for each."""
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.data_loading_seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @contextmanager
    def exclude_from_timing(self) -> Iterator[None]:
        """Exclude this block from step timing."""
        start = time.perf_counter()
        yield
        self.start_time += time.perf_counter() - start

    def add(self, batch: Batch, loss: Tensor, grad_norm: Tensor) -> None:
        """Collect a step's batch, loss () on this rank and gradient norm ()."""
        height, width = batch.latents.shape[-2:]
        self.latent_sizes.append((height, width))
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def log(self) -> None:
        """Log each step's loss, averaged over ranks, and the interval's throughput; every rank must call it.

        Raises DivergedError if too many consecutive steps were skipped.
        """
        if not self.losses:
            return
        last, count = self.trainer.steps_done, len(self.losses)
        total = torch.stack(self.losses)
        dist.all_reduce(total)
        losses, grad_norms = (total / self.ranks.world_size).tolist(), torch.stack(self.grad_norms).tolist()
        seconds = (time.perf_counter() - self.start_time) / count
        node_metrics = self.ranks.gather((load_average(), peak_memory_gib(self.ranks.device)))
        if self.ranks.is_first:
            for step, loss, grad_norm in zip(range(last - count + 1, last + 1), losses, grad_norms, strict=True):
                self.detect_spike(step, loss, grad_norm)
                lr = learning_rate(step - 1, self.config)
                self.reporter.metrics(step, {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr": lr})
            throughput = self.throughput(seconds)
            self.reporter.metrics(last, {**throughput, **self.system_metrics(node_metrics)})
            logger.info(self.progress_line(last, losses[-1], grad_norms[-1], seconds, throughput))
        self.start_interval()
        if self.trainer.consecutive_skips >= self.config.max_skipped_steps:
            raise DivergedError(
                f"step {last}: the gradients of the last {int(self.trainer.consecutive_skips)} steps were not finite; "
                "resume from an earlier checkpoint with a smaller learning rate, or inspect the rows of these steps"
            )

    def detect_spike(self, step: int, loss: float, grad_norm: float) -> None:
        """Report a step that was skipped or whose loss is a spike, with the rows of its batch."""
        message = ""
        if not abs(grad_norm) < float("inf"):
            message = f"update skipped: gradient norm {grad_norm}, loss {loss:.4g}"
        elif len(self.previous_losses) >= MIN_SPIKE_WINDOW:
            mean, deviation = mean_and_std(self.previous_losses)
            if loss > mean + SPIKE_THRESHOLD * deviation:
                deviations = (loss - mean) / deviation
                message = f"loss spike: {loss:.4f} is {deviations:.0f} standard deviations above the mean {mean:.4f}"
        if message:
            rows = ", ".join(map(str, self.order.rows(step - 1)))
            self.reporter.incident(step, f"{message}; rows {rows}")
            logger.warning("step %d: %s", step, message)
        else:
            self.previous_losses.append(loss)

    def throughput(self, seconds: float) -> dict[str, float]:
        """Return the throughput metrics of an interval whose steps took `seconds` each, on average."""
        images = self.config.global_batch_size / seconds
        steps = len(self.latent_sizes)
        flops_per_image = sum(self.flops_per_image[size] for size in self.latent_sizes) / steps
        tokens_per_image = sum(map(self.trainer.tokens_per_image, self.latent_sizes)) / steps
        tflops = images * flops_per_image / self.ranks.world_size / 1e12
        metrics = {
            "train/seconds_per_step": seconds,
            "train/images_per_second": images,
            "train/tokens_per_second": images * tokens_per_image,
            "train/tflops_per_rank": tflops,
            "train/data_loading_fraction": self.data_loading_seconds / len(self.losses) / seconds,
        }
        return {**metrics, "train/mfu": tflops / self.peak_tflops} if self.peak_tflops else metrics

    def system_metrics(self, by_rank: list[tuple[float, float]]) -> dict[str, float]:
        """Return the load average and peak memory of each node, from its first rank."""
        metrics: dict[str, float] = {}
        for node, (load, memory) in enumerate(by_rank[:: self.ranks.local_world_size]):
            metrics[f"system/node_{node}/load_average_1m"] = load
            metrics[f"system/node_{node}/max_memory_allocated_gib"] = memory
        return metrics

    def progress_line(
        self, step: int, loss: float, grad_norm: float, seconds: float, throughput: dict[str, float]
    ) -> str:
        """Return the log line of an interval's last step."""
        mfu = f" (MFU {throughput['train/mfu']:.0%})" if "train/mfu" in throughput else ""
        memory = "allocated" if self.ranks.device.type == "cuda" else "resident"
        return (
            f"step {step}/{self.config.steps}  loss {loss:.4f}  gradient norm {grad_norm:.3f}  "
            f"learning rate {learning_rate(step - 1, self.config):.2e}  "
            f"{throughput['train/images_per_second']:.0f} images/s  "
            f"{throughput['train/tokens_per_second']:.0f} tokens/s  "
            f"{throughput['train/tflops_per_rank']:.3g} TFLOP/s per rank{mfu}  "
            f"{peak_memory_gib(self.ranks.device):.1f} GiB {memory} per rank  "
            f"data loading {throughput['train/data_loading_fraction']:.0%}  "
            f"{format_duration((self.config.steps - step) * seconds)} left"
        )

    def log_fp8_metrics(self) -> None:
        """Log the FP8 metrics of each linear; linears that saturate in too many steps fall back to BF16."""
        step = self.trainer.steps_done
        metrics = scaling.fp8_metrics(self.trainer.model)
        fallbacks = self.trainer.fall_back_to_bf16()
        if self.ranks.is_first:
            values = {f"fp8/{metric}/{key}": value for metric, keys in metrics.items() for key, value in keys.items()}
            self.reporter.metrics(step, values)
            for message in fallbacks:
                self.reporter.incident(step, message)
                logger.warning("step %d: %s", step, message)


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, computed in float64."""
    tensor = torch.tensor(list(values), dtype=torch.float64)
    return float(tensor.mean()), float(tensor.std())


def load_average() -> float:
    """Return the node's load average over the last minute."""
    return os.getloadavg()[0]


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB: allocated by torch on a GPU, else the resident set size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def format_duration(seconds: float) -> str:
    """Format a duration as H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
