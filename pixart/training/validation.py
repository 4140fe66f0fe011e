"""The loss on rows that training never sees, at fixed t and noise: a curve without the noise of the training loss."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pixart.data.loader import Batch, rows_batch
from pixart.data.store import Store
from pixart.model.flow import fixed_time, flow_loss, interpolate
from pixart.training.step import Training


class Validation:
    """Rows and their t are dealt out to the ranks; the result does not depend on their number."""

    def __init__(self, training: Training, store: Store, rows: np.ndarray) -> None:
        ranks = training.ranks
        if len(rows) % ranks.world:
            raise ValueError(f"validation_rows={len(rows)}: does not divide over {ranks.world} ranks")
        self.training, self.store = training, store
        self.rows, self.t = rows[ranks.rank :: ranks.world], fixed_time(len(rows))[ranks.rank :: ranks.world]

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Of the weights and of their average; every rank must call it."""
        training = self.training
        own = self.loss()
        with training.ema.in_place_of(training.model):
            averaged = self.loss()
        return {"val/loss": own, "val/loss_ema": averaged}

    def loss(self) -> float:
        training = self.training
        device, size = training.ranks.device, training.micro_batch
        total = torch.zeros((), device=device)
        training.model.eval()
        for begin in range(0, len(self.rows), size):
            rows = self.rows[begin : begin + size]
            batch = rows_batch(self.store, rows, states=training.stage == 2)
            data = training.normalization.apply(batch.latents.to(device))
            noise, t = noise_of(batch, data.shape[1:]).to(device), self.t[begin : begin + size].to(device)
            velocity = training.model(interpolate(data, noise, t), t, **training.condition(batch))
            total += flow_loss(velocity, data, noise) * len(rows)
        training.model.train()
        dist.all_reduce(total)
        return float(total) / (len(self.rows) * training.ranks.world)


def noise_of(batch: Batch, shape: torch.Size) -> Tensor:
    """(B, C, h, w), each row's by its own number."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(row))) for row in batch.rows]
    return torch.stack(draws)
