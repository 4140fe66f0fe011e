"""Preview images of a run: the same conditioning and noise at each time, sampled with the EMA weights."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixart.config.aspect_buckets import nearest_bucket
from pixart.data.encoders.text_encoder import TextEncoder
from pixart.data.encoders.vae import decode, load_vae
from pixart.data.loading.loader import Batch, load_rows
from pixart.data.store.zarr_store import Store
from pixart.sampling.contact_sheet import contact_sheet
from pixart.sampling.denoise import sample
from pixart.training.conditioning import TextConditioning
from pixart.training.trainer import Trainer

STEPS, GUIDANCE, SEED = 20, 3.0, 0


class PreviewSampler:
    """Samples previews on all ranks, as the model is sharded; rank 0 decodes them while training continues."""

    def __init__(
        self, trainer: Trainer, store: Store, rows: np.ndarray, run: Path, prompts: Sequence[str] = ()
    ) -> None:
        world_size, rank = trainer.ranks.world_size, trainer.ranks.rank
        self.trainer, self.folder, self.num_images = trainer, run / "previews", len(prompts or rows)
        shapes = trainer.dataset.latent_shapes
        square = nearest_bucket(1, 1, [shape[1:] for shape in shapes])
        buckets = np.full(len(prompts), square) if prompts else store.bucket_of(rows)
        self.batches: list[tuple[np.ndarray, tuple[int, int], Batch]] = []  # indices, height and width of the latents
        for bucket in np.unique(buckets).tolist():
            members = np.flatnonzero(buckets == bucket)
            per_rank = -(-len(members) // world_size)  # the same number of images on every rank
            indices = members[np.arange(rank * per_rank, (rank + 1) * per_rank) % len(members)]
            if prompts:
                batch = prompt_batch(store, [prompts[index] for index in indices.tolist()])
            else:
                batch = load_rows(store, rows[indices], text_embeddings=trainer.stage == 2)
            self.batches.append((indices, shapes[bucket][1:], batch))
        # A second OpenMP team, even an idle one, makes more threads than processors, and every parallel region of the
        # training steps then yields to the system instead of spinning: half the speed on a CPU.
        self.executor = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self.pending: Future[None] | None = None

    def sample(self, report: Callable[[Path], None]) -> None:
        """Sample and write `previews/step-N.png` in the background, then call `report`; every rank must call it."""
        trainer, sampled = self.trainer, []
        trainer.model.eval()
        with trainer.ema.applied_to(trainer.model):
            for indices, latent_size, batch in self.batches:
                null_batch = dataclasses.replace(batch, dropped=torch.ones_like(batch.dropped))
                latents = sample(
                    trainer.model,
                    trainer.conditioning(batch),
                    trainer.conditioning(null_batch),
                    latent_size=latent_size,
                    steps=STEPS,
                    guidance=GUIDANCE,
                    seed=SEED,
                    time_shift=trainer.time_shift(*latent_size),
                )
                sampled.append((indices, trainer.normalization.undo(latents).cpu(), self.prompts(batch)))
        trainer.model.train()
        parts = [part for of_rank in trainer.ranks.gather(sampled) for part in of_rank]
        if trainer.ranks.is_first:
            self.close()
            file = self.folder / f"step-{trainer.steps_done:08d}.png"
            self.pending = self.executor.submit(self.write, file, parts, report)

    def prompts(self, batch: Batch) -> list[str]:
        """Return the prompt of each image: its caption, decoded from tokens, or its class name."""
        if isinstance(self.trainer.conditioning, TextConditioning):
            return self.trainer.conditioning.decode_captions(batch)
        names = self.trainer.dataset.class_names
        return [names[label] if label >= 0 else "" for label in batch.label.tolist()]

    def write(
        self, file: Path, parts: list[tuple[np.ndarray, Tensor, list[str]]], report: Callable[[Path], None]
    ) -> None:
        """Decode the latents of all ranks and aspect buckets and write the contact sheet."""
        vae, pixel_range = load_vae(self.trainer.dataset.data.vae), self.trainer.normalization.pixel_range
        samples = {
            index: (Image.fromarray(image), prompt)
            for indices, latents, prompts in parts
            for index, image, prompt in zip(indices.tolist(), decode(vae, latents, pixel_range), prompts, strict=True)
        }
        images, captions = zip(*(samples[index] for index in range(self.num_images)), strict=True)
        file.parent.mkdir(exist_ok=True)
        partial = file.with_suffix(".part")
        contact_sheet(images, captions).save(partial, format="png")
        partial.replace(file)
        report(file)

    def close(self) -> None:
        """Wait for the image that is being written, and raise its error if there is one."""
        if self.pending:
            self.pending.result()


def prompt_batch(store: Store, prompts: Sequence[str]) -> Batch:
    """Return a batch of prompts, with their text embeddings if those of the dataset are stored; it has no latents."""
    data, count = store.manifest.data, len(prompts)
    encoder = TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
    ids, mask = encoder.tokenize(list(prompts))
    states = encoder.states(ids, mask).to(torch.float16).cpu() if data.store_text_embeddings else None
    return Batch(
        rows=np.full(count, -1),
        latents=torch.zeros(count, 0),
        label=torch.full((count,), -1, dtype=torch.int32),
        dropped=torch.zeros(count, dtype=torch.bool),
        token_ids=torch.from_numpy(ids),
        token_mask=torch.from_numpy(mask),
        text_states=states,
    )
