"""What the model is told of each image: its class or its caption, or "none" where that is dropped."""

import torch
from torch import Tensor

from pixart.config.training import TrainConfig
from pixart.data.loading.loader import Batch
from pixart.data.manifest import Manifest
from pixart.model.dit import DiT
from pixart.training.parallelize import shard_frozen
from pixart.training.process_group import Ranks

ALIGNMENT = 8  # of the number of keys: attention reads a mask by 16 bytes, and compiled blocks see few lengths


class ClassCondition:
    """Stage 1: the class, or "no class" where it is dropped or not known."""

    def __init__(self, model: DiT, device: torch.device) -> None:
        self.none, self.device = model.config.num_classes - 1, device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        label, dropped = (tensor.to(self.device, non_blocking=True) for tensor in (batch.label, batch.dropped))
        return {"label": torch.where(dropped | (label < 0), self.none, label).long()}


class TextCondition:
    """Stage 2: the caption's states, from the store or from the encoder, or those of the empty text."""

    def __init__(self, dataset: Manifest, ranks: Ranks, config: TrainConfig) -> None:
        from pixart.data.encoders.text_encoder import TextEncoder

        data, device = dataset.data, ranks.device
        encoder = TextEncoder(data.text_encoder, tokens=data.max_text_tokens, scale=data.text_scale)
        self.null_states, self.null_mask = (tensor.to(device) for tensor in encoder.encode([""]))
        self.null_length = int(self.null_mask.sum())
        self.encoder, self.device = None if data.store_text_embeddings else encoder, device
        self.tokenizer = encoder.tokenizer
        if self.encoder and config.compile:
            self.encoder.model.compile()
        if self.encoder and config.shard_text_encoder:
            shard_frozen(self.encoder.model, ranks)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        dropped = batch.dropped.to(self.device, non_blocking=True)
        mask = torch.where(dropped[:, None], self.null_mask, batch.token_mask.to(self.device, non_blocking=True))
        if self.encoder:
            states = self.encoder.states(batch.token_ids, batch.token_mask)
        else:
            assert batch.text_states is not None  # the manifest says that the store keeps them
            states = batch.text_states.to(self.device, non_blocking=True).float()
        # Padding is on the right, and keys that no caption has are left out: counted on the CPU, without a wait.
        longest = max(int(batch.token_mask.sum(1).max()), self.null_length)
        longest += -longest % ALIGNMENT
        states = torch.where(dropped[:, None, None], self.null_states, states)
        return {"text": states[:, :longest], "text_mask": mask[:, :longest]}

    def texts(self, batch: Batch) -> list[str]:
        """The captions, as far as their tokens tell them."""
        pairs = zip(batch.token_ids, batch.token_mask, strict=True)
        return [self.tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in pairs]
