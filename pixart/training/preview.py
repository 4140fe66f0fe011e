"""Pictures of a run while it trains: the same rows' conditions and the same noise, from the average of the weights."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixart.data.encoders.vae import decode, load_vae
from pixart.data.loading.loader import load_rows
from pixart.data.store.zarr_store import Store
from pixart.sampling.contact_sheet import contact_sheet
from pixart.sampling.denoise import sample
from pixart.training.conditioning import TextCondition
from pixart.training.trainer import Training

STEPS, GUIDANCE, SEED = 20, 3.0, 0


class Previews:
    """Each rank samples its part, as all must run the sharded model; one of them decodes, while training goes on."""

    def __init__(self, training: Training, store: Store, rows: np.ndarray, run: Path) -> None:
        world, rank = training.ranks.world, training.ranks.rank
        self.training, self.folder, self.count = training, run / "previews", len(rows)
        share = -(-len(rows) // world)  # the same number of pictures for every rank
        self.places = np.arange(rank * share, (rank + 1) * share) % len(rows)
        self.batch = load_rows(store, rows[self.places], text_embeddings=training.stage == 2)
        # A second OpenMP team, be it idle, makes more threads than processors, and every parallel region of the steps
        # waits for the system then instead of spinning: half the speed on a CPU.
        self.pool = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.written: Future[None] | None = None

    def make(self, tell: Callable[[Path], None]) -> None:
        """Samples now and writes `previews/step-N.png` in the background; every rank must call it."""
        training = self.training
        condition = training.condition(self.batch)
        null = training.condition(dataclasses.replace(self.batch, dropped=torch.ones_like(self.batch.dropped)))
        training.model.eval()
        with training.ema.in_place_of(training.model):
            latents = sample(
                training.model,
                condition,
                null,
                latent_size=training.dataset.latent_shape[1],
                steps=STEPS,
                guidance=GUIDANCE,
                seed=SEED,
            )
        training.model.train()
        parts = training.ranks.gather((self.places, training.normalization.undo(latents).cpu(), self.names()))
        if training.ranks.first:
            self.close()
            file = self.folder / f"step-{training.steps_done:08d}.png"
            self.written = self.pool.submit(self.write, file, parts, tell)

    def names(self) -> list[str]:
        """What each picture is to show: its caption, out of its tokens, or its class."""
        if isinstance(self.training.condition, TextCondition):
            return self.training.condition.texts(self.batch)
        names = self.training.dataset.class_names
        return [names[label] if label >= 0 else "" for label in self.batch.label.tolist()]

    def write(
        self, file: Path, parts: list[tuple[np.ndarray, Tensor, list[str]]], tell: Callable[[Path], None]
    ) -> None:
        found = {
            place: (latent, name)
            for places, latents, names in parts
            for place, latent, name in zip(places.tolist(), latents, names, strict=True)
        }
        latents = torch.stack([found[place][0] for place in range(self.count)])
        images = [Image.fromarray(image) for image in decode(load_vae(self.training.dataset.data.vae), latents)]
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".part")
        contact_sheet(images, [found[place][1] for place in range(self.count)]).save(partial, format="png")
        partial.replace(file)
        tell(file)

    def close(self) -> None:
        """Waits for the picture that is being written."""
        if self.written:
            self.written.result()
