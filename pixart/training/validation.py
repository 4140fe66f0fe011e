"""The loss on rows that training never sees, at fixed t and noise: a curve without the noise of the training loss."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pixart.data.loading.loader import Batch, load_rows
from pixart.data.store.zarr_store import Store
from pixart.model.rectified_flow import fixed_time, interpolate
from pixart.training.trainer import Training


class Validation:
    """Rows and their t are dealt out to the ranks; the result does not depend on the number of these."""

    def __init__(self, training: Training, store: Store, rows: np.ndarray) -> None:
        ranks = training.ranks
        self.training, self.store, self.count = training, store, len(rows)
        dealt = np.arange(ranks.rank, -(-len(rows) // ranks.world) * ranks.world, ranks.world)
        self.counts = torch.from_numpy(dealt < len(rows)).float()  # some ranks have one that does not, to go along
        self.rows, self.t = rows[dealt % len(rows)], fixed_time(len(rows))[dealt % len(rows)]

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Of the weights and of their average; every rank must call it."""
        own = self.loss()
        with self.training.ema.in_place_of(self.training.model):
            averaged = self.loss()
        return {"val/loss": own, "val/loss_ema": averaged}

    def loss(self) -> float:
        training, device = self.training, self.training.ranks.device
        total = torch.zeros((), device=device)
        training.model.eval()
        for part in np.split(
            np.arange(len(self.rows)), range(training.micro_batch, len(self.rows), training.micro_batch)
        ):
            batch = load_rows(self.store, self.rows[part], text_embeddings=training.stage == 2)
            data = training.normalization.apply(batch.latents.to(device))
            noise, t = noise_of(batch, data.shape[1:]).to(device), self.t[part].to(device)
            velocity = training.model(interpolate(data, noise, t), t, **training.condition(batch))
            errors = (velocity.float() - (data - noise)).square().mean(dim=(1, 2, 3))
            total += errors @ self.counts[part].to(device)
        training.model.train()
        dist.all_reduce(total)
        return float(total) / self.count


def noise_of(batch: Batch, shape: torch.Size) -> Tensor:
    """(B, C, h, w), each row's by its own number."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(int(row))) for row in batch.rows]
    return torch.stack(draws)
