"""What a run says of itself: curves, speed, spikes, scales."""

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from pixart.data.loading.loader import Batch
from pixart.data.loading.sampler import Order, rows_of_step
from pixart.model.flops import peak_tflops, training_flops
from pixart.model.fp8 import scaling
from pixart.training.optimizer import learning_rate
from pixart.training.trainer import Training

SPIKE = 6.0  # standard deviations over the mean of the losses before
REMEMBERED = 200  # losses that a spike is judged by
FEWEST = 20


class Reporter(Protocol):
    """Who is told; on rank 0 alone."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def incident(self, step: int, text: str) -> None: ...

    def artifact(self, file: Path) -> None: ...


class Quiet:
    def metrics(self, step: int, values: dict[str, float]) -> None:
        pass

    def incident(self, step: int, text: str) -> None:
        pass

    def artifact(self, file: Path) -> None:
        pass


class DivergedError(Exception):
    """Too many steps in a row had a gradient that is not finite."""


class Interval:
    """What happened since it was last told, collected without a wait for the device."""

    def __init__(self, training: Training, order: Order, reporter: Reporter) -> None:
        self.training, self.order, self.reporter = training, order, reporter
        self.config, self.ranks = training.config, training.ranks
        self.before: deque[float] = deque(maxlen=REMEMBERED)
        self.tokens = training.tokens
        side = training.dataset.latent_shape[-1]
        self.flops = training_flops(training.description().config, side, training.dataset.data.max_text_tokens)
        precision = "fp8" if training.plan else self.config.precision
        cuda = self.ranks.device.type == "cuda"
        self.peak = peak_tflops(torch.cuda.get_device_name(), precision) if cuda else None
        self.clear()

    def clear(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; how long each was waited for is added up."""
        iterator = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For what is no step and whose time counts for none."""
        begun = time.perf_counter()
        yield
        self.since += time.perf_counter() - begun

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def tell(self) -> None:
        """Every step's loss over all ranks, and the interval's speed; every rank must call it.

        Raises DivergedError after too many steps that were left out.
        """
        if not self.losses:
            return
        last, count = self.training.steps_done, len(self.losses)
        values = torch.stack(self.losses)
        dist.all_reduce(values)
        losses, norms = (values / self.ranks.world).tolist(), torch.stack(self.norms).tolist()
        seconds = (time.perf_counter() - self.since) / count
        machines = self.ranks.gather(machine(self.ranks.device))
        if self.ranks.first:
            for step, loss, norm in zip(range(last - count + 1, last + 1), losses, norms, strict=True):
                self.judge(step, loss, norm)
                curves = {"train/loss": loss, "train/grad_norm": norm, "train/lr": learning_rate(step - 1, self.config)}
                self.reporter.metrics(step, curves)
            speed = self.speed(seconds)
            self.reporter.metrics(last, {**speed, **self.systems(machines)})
            print(self.line(last, losses[-1], norms[-1], seconds, speed), flush=True)
        self.clear()
        if self.training.skipped_in_row >= self.config.max_skipped_steps:
            raise DivergedError(
                f"the gradients of the last {int(self.training.skipped_in_row)} steps to step {last} were not finite: "
                "go on from an earlier checkpoint with a smaller learning rate, or look at the rows of these steps"
            )

    def judge(self, step: int, loss: float, norm: float) -> None:
        """Tells of a step that was left out or stands out, with the rows of its batch."""
        odd = ""
        if not abs(norm) < float("inf"):
            odd = f"left out: the gradient's norm is {norm}, the loss {loss:.4g}"
        elif len(self.before) >= FEWEST:
            mean, deviation = moments(self.before)
            if loss > mean + SPIKE * deviation:
                odd = f"the loss {loss:.4f} is {(loss - mean) / deviation:.0f} deviations over its mean {mean:.4f}"
        if odd:
            rows = ", ".join(map(str, rows_of_step(self.order, step - 1, self.config.global_batch_size)))
            self.reporter.incident(step, f"{odd}; rows {rows}")
            print(f"step {step}: {odd}", file=sys.stderr, flush=True)
        else:
            self.before.append(loss)

    def speed(self, seconds: float) -> dict[str, float]:
        images = self.config.global_batch_size / seconds
        tflops = images * self.flops / self.ranks.world / 1e12
        values = {
            "train/seconds_per_step": seconds,
            "train/images_per_second": images,
            "train/tokens_per_second": images * self.tokens,
            "train/tflops_per_rank": tflops,
            "train/data_wait": self.waited / len(self.losses) / seconds,
        }
        return {**values, "train/mfu": tflops / self.peak} if self.peak else values

    def systems(self, machines: list[tuple[float, float]]) -> dict[str, float]:
        """Load and memory of each node, by its first rank."""
        values: dict[str, float] = {}
        for node, (load, memory) in enumerate(machines[:: self.ranks.local_world]):
            values |= {f"system/load_node{node}": load, f"system/memory_gb_node{node}": memory}
        return values

    def line(self, step: int, loss: float, norm: float, seconds: float, speed: dict[str, float]) -> str:
        left = (self.config.steps - step) * seconds
        mfu = f" (MFU {speed['train/mfu']:.0%})" if "train/mfu" in speed else ""
        return (
            f"step {step}/{self.config.steps}  loss {loss:.4f}  gradient {norm:.3f}  "
            f"lr {learning_rate(step - 1, self.config):.2e}  {speed['train/images_per_second']:.0f} images/s  "
            f"{speed['train/tokens_per_second']:.0f} tokens/s  {speed['train/tflops_per_rank']:.3g} TFLOP/s{mfu}  "
            f"{machine(self.ranks.device)[1]:.1f} GB  data wait {speed['train/data_wait']:.0%}  {clock(left)} left"
        )

    def tell_scales(self) -> None:
        """FP8: each linear's scale, headroom and overflow; one that keeps overflowing goes on in BF16."""
        step = self.training.steps_done
        told = scaling.health(self.training.model)
        fallen = self.training.fall_back()
        if self.ranks.first:
            values = {f"fp8/{what}/{name}": value for what, found in told.items() for name, value in found.items()}
            self.reporter.metrics(step, values)
            for text in fallen:
                self.reporter.incident(step, text)
                print(f"step {step}: {text}", file=sys.stderr, flush=True)


def moments(values: Iterable[float]) -> tuple[float, float]:
    found = torch.tensor(list(values), dtype=torch.float64)
    return float(found.mean()), float(found.std())


def machine(device: torch.device) -> tuple[float, float]:
    """Load of the last minute, and the largest memory so far in GB: of the device, or of this process."""
    if device.type == "cuda":
        return os.getloadavg()[0], torch.cuda.max_memory_allocated() / 1e9
    return os.getloadavg()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
