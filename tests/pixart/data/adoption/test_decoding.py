"""Captions decoded many at once are those of the tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pixart.data.adoption.decoding import Decoder
from pixart.data.encoders.text_encoder import load_tokenizer
from pixart.demo.scenes import caption, make_scene

CAPTIONS = [caption(make_scene(0, number)) for number in range(200)]
CAPTIONS += ["Don't stop, it's 5 o'clock!", "naïve café — 東京 🙂", "a  b\nc . d , e ' f n't 've"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]"]


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CAPTIONS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL))
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def end_of_word() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="[UNK]", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    pieces = [
        ("[UNK]", 0.0),
        ("▁", -1.0),
        ("▁a", -2.0),
        ("b", -2.5),
        *((f"<0x{byte:02X}>", -9.0) for byte in range(256)),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def check(tokenizer, ids: np.ndarray, mask: np.ndarray) -> None:
    rows = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    assert Decoder(tokenizer).decode(ids, mask) == tokenizer.batch_decode(rows, skip_special_tokens=True)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("make", [word_piece, byte_level, end_of_word, unigram, byte_fallback])
def test_captions_are_those_of_the_tokenizer(make, clean_up: bool):
    """Of texts, of any token ids in any order, of ids beyond the vocabulary, and of empty rows."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make(), unk_token="[UNK]", pad_token="[PAD]", clean_up_tokenization_spaces=clean_up
    )
    tokenizer.add_tokens(["<added>", "x y"])
    batch = tokenizer(CAPTIONS, padding="max_length", max_length=80, truncation=True, return_tensors="np")
    check(tokenizer, batch["input_ids"].astype(np.int32), batch["attention_mask"] == 1)
    generator = np.random.default_rng(0)
    ids = generator.integers(0, len(tokenizer) + 2, (3000, 12)).astype(np.int32)
    check(tokenizer, ids, np.arange(12) < generator.integers(0, 13, (3000, 1)))


def test_captions_of_the_stored_encoder():
    tokenizer = load_tokenizer("minilm")
    ids = np.random.default_rng(0).integers(0, len(tokenizer), (500, 20)).astype(np.int32)
    check(tokenizer, ids, np.ones(ids.shape, bool))
