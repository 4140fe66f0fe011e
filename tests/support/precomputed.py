"""Shards of precomputed latents as training code outside of the suite writes them, and a small T5Gemma."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHAPE = (16, 8, 8)  # of latents: 64 pixels of the demo's VAE
IDS = {"captions": ("long_caption", "short_caption"), "tokens": ("text_tokens",)}
MASKS = {"text_tokens": "attn_mask", "long_caption": "long_caption_mask", "short_caption": "short_caption_mask"}
WIDTH = 12  # token ids of a caption
WORDS = ("red", "green", "blue", "circle", "square", "on", "white", "a", "the", "left")


def random_latents(rows: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """Return latents of about unit variance, bfloat16 (rows, C, h, w)."""
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def random_tokens(rows: int, vocabulary: int, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Return right-padded token ids, int32, and masks, int8, of captions of 1 to `width` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    ids = torch.randint(1000, vocabulary, (rows, width), generator=generator) * mask
    return ids.to(torch.int32), mask.to(torch.int8)


def torch_entries(form: str, rows: int, *, vocabulary: int = 30_000, classes: int = 5, seed: int = 0) -> dict[str, Any]:
    """Return the entries of a `.pt` shard of a form, all of whose rows are valid."""
    entries: dict[str, Any] = {"latents": random_latents(rows, seed)}
    if form == "labels":
        entries["labels"] = (torch.arange(rows) % classes).to(torch.int16)
    for index, name in enumerate(IDS.get(form, ())):
        entries[name], entries[MASKS[name]] = random_tokens(rows, vocabulary, 10 * seed + index)
    return entries


def spoil(entries: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Fill rows of a shard with random bytes, as in a buffer that was never initialized; return the shard."""
    generator = torch.Generator().manual_seed(7)
    for value in entries.values():
        part = value.view(torch.int16)[rows] if value.dtype == torch.bfloat16 else value[rows]
        limits = torch.iinfo(part.dtype)
        part.copy_(torch.randint(limits.min, limits.max, part.shape, generator=generator))
    return entries


def write_torch_shards(folder: Path, form: str, lengths: list[int], **options: Any) -> Path:
    """Write `.pt` shards with these numbers of rows, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, rows in enumerate(lengths):
        torch.save(torch_entries(form, rows, seed=shard, **options), folder / f"shard_{shard:06d}.pt")
    return folder


def record(latent: Tensor, **values: Any) -> dict[str, Any]:
    """Return a record of an ArrayRecord: the bits of a latent, and a label or captions."""
    return {"latent": latent.view(torch.int16).numpy(), **values}


def text_records(rows: int) -> list[dict[str, Any]]:
    """Return records with captions."""
    texts = [" ".join(WORDS[(row + index) % len(WORDS)] for index in range(5)) for row in range(rows)]
    return [
        record(latent, short_caption=text[:8], long_caption=text)
        for latent, text in zip(random_latents(rows), texts, strict=True)
    ]


def label_records(rows: int, classes: int = 3) -> list[dict[str, Any]]:
    """Return records with labels."""
    return [record(latent, label=np.int64(row % classes)) for row, latent in enumerate(random_latents(rows))]


def write_array_record(path: Path, records: list[Any]) -> Path:
    """Write pickled records, or bytes as they are, to an ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for item in records:
        writer.write(item if isinstance(item, bytes) else pickle.dumps(item, protocol=4))
    writer.close()
    return path


def make_t5gemma(folder: Path, vocabulary: int, width: int = 16) -> Path:
    """Write a very small T5Gemma with random weights, and a tokenizer with a word for each id; return the folder.

    `width` is that of its text embeddings.
    """
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaModel
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    words = [*special, *WORDS, *(f"word{index}" for index in range(len(special) + len(WORDS), vocabulary))]
    tokenizer = Words(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = T5GemmaModuleConfig(vocab_size=vocabulary, num_key_value_heads=1, head_dim=8, **sizes)
    T5GemmaModel(T5GemmaConfig(encoder=module, decoder=module, vocab_size=vocabulary)).save_pretrained(folder)
    return folder
