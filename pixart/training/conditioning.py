"""Conditioning inputs of the model: class labels or text embeddings, replaced by null ones where they are dropped."""

import torch
from torch import Tensor

from pixart.config.training import TrainConfig
from pixart.data.loading.loader import Batch
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT
from pixart.training.parallelize import shard_frozen
from pixart.training.process_group import Ranks

# Text lengths are padded to multiples of this: attention reads a mask in units of 16 bytes, and compiled blocks are
# specialized for few lengths.
TEXT_ALIGNMENT = 8


class ClassConditioning:
    """Conditioning of stage 1: the class, or the null class where it is dropped or unknown."""

    def __init__(self, model: DiT, device: torch.device) -> None:
        self.null_label, self.device = model.config.num_classes - 1, device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's `label` (B,)."""
        label, dropped = (tensor.to(self.device, non_blocking=True) for tensor in (batch.label, batch.dropped))
        return {"label": torch.where(dropped | (label < 0), self.null_label, label).long()}


class TextConditioning:
    """Conditioning of stage 2: text embeddings, stored or encoded on the fly; of the empty text where it is dropped."""

    def __init__(self, dataset: Manifest, ranks: Ranks, config: TrainConfig) -> None:
        from pixart.data.encoders.text_encoder import TextEncoder

        data, device = dataset.data, ranks.device
        encoder = TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
        self.null_embeddings, self.null_mask = (tensor.to(device) for tensor in encoder.encode([""]))
        self.null_length = int(self.null_mask.sum())
        self.encoder, self.device = None if data.store_text_embeddings else encoder, device
        self.tokenizer = encoder.tokenizer
        if self.encoder and config.compile:
            self.encoder.model.compile()
        if self.encoder and config.shard_text_encoder:
            shard_frozen(self.encoder.model, ranks)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's `text` (B, L, text_dim) and `text_mask` (B, L), L the longest caption of the batch."""
        dropped = batch.dropped.to(self.device, non_blocking=True)
        mask = torch.where(dropped[:, None], self.null_mask, batch.token_mask.to(self.device, non_blocking=True))
        if self.encoder:
            embeddings = self.encoder.states(batch.token_ids, batch.token_mask)
        else:
            assert batch.text_states is not None  # the manifest says that the dataset stores them
            embeddings = batch.text_states.to(self.device, non_blocking=True).float()
        # Padding is on the right. The length is computed on the CPU, where it needs no synchronization.
        length = max(int(batch.token_mask.sum(1).max()), self.null_length)
        length += -length % TEXT_ALIGNMENT
        embeddings = torch.where(dropped[:, None, None], self.null_embeddings, embeddings)
        return {"text": embeddings[:, :length], "text_mask": mask[:, :length]}

    def decode_captions(self, batch: Batch) -> list[str]:
        """Return the captions of a batch, decoded from their tokens."""
        pairs = zip(batch.token_ids, batch.token_mask, strict=True)
        return [self.tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]
