"""Validation: the loss of validation rows at fixed times and noise, without the variance of the training loss."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pixart.data.loading.loader import Batch, load_rows
from pixart.data.store.zarr_store import Store
from pixart.model.rectified_flow import fixed_time, interpolate, shift_time
from pixart.training.trainer import Trainer


class Validator:
    """Computes validation losses, which do not depend on the number of ranks; each rank has a share of the rows."""

    def __init__(self, trainer: Trainer, store: Store, rows: np.ndarray) -> None:
        ranks = trainer.ranks
        self.trainer, self.store, self.rows, self.t = trainer, store, rows, fixed_time(len(rows))
        self.batches: list[tuple[np.ndarray, Tensor]] = []  # indices of rows (B,) of one aspect bucket, weights (B,)
        buckets = store.bucket_of(rows)
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            per_rank = -(-len(members) // ranks.world_size)
            places = np.arange(ranks.rank, per_rank * ranks.world_size, ranks.world_size)
            # All ranks run the same number of forward passes; a surplus row has weight 0.
            for part in np.split(places, range(trainer.micro_batch_size, per_rank, trainer.micro_batch_size)):
                weights = torch.from_numpy(part < len(members)).float()
                self.batches.append((members[part % len(members)], weights))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the losses of the weights and of the EMA weights; every rank must call it."""
        loss = self.loss()
        with self.trainer.ema.applied_to(self.trainer.model):
            ema_loss = self.loss()
        return {"val/loss": loss, "val/loss_ema": ema_loss}

    def loss(self) -> float:
        """Return the mean loss of the model's current weights over all ranks."""
        trainer, device = self.trainer, self.trainer.ranks.device
        total = torch.zeros((), device=device)
        trainer.model.eval()
        for indices, weights in self.batches:
            batch = load_rows(self.store, self.rows[indices], text_embeddings=trainer.stage == 2)
            data = trainer.normalization.apply(batch.latents.to(device))
            noise = row_noise(batch, data.shape[1:]).to(device)
            t = shift_time(self.t[indices].to(device), trainer.time_shift(*data.shape[2:]))
            velocity = trainer.model(interpolate(data, noise, t), t, **trainer.conditioning(batch))
            errors = (velocity.float() - (data - noise)).square().mean(dim=(1, 2, 3))
            total += errors @ weights.to(device)
        trainer.model.train()
        dist.all_reduce(total)
        return float(total) / len(self.rows)


def row_noise(batch: Batch, shape: torch.Size) -> Tensor:
    """Return noise (B, C, h, w), each row's seeded by its row number."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(int(row))) for row in batch.rows]
    return torch.stack(noise)
