"""The CLIP score and CLIP's features with a tiny CLIP that the test makes, and the similarity of captions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from pixart.evaluation import features
from pixart.evaluation.similarity import ClipScorer, text_similarity
from tests.support.evaluation import scenes

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PROMPTS = ["a red star", "a star a red star a red star a red star a red star a red star"]
CONTEXT = 12  # tokens


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a CLIP model with random weights, whose vocabulary has letters alone."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [f"{letter}{end}" for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CONTEXT)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 1}
    text = {**SIZES, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": CONTEXT}
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def test_the_clip_score_equals_the_logits_without_temperature(clip):
    """100 times the cosine, which the model's logits are times its temperature; long prompts are truncated."""
    images = scenes(2, 0)
    scores = ClipScorer(str(clip)).score(images, PROMPTS)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    values = processor(text=PROMPTS, images=images, padding=True, truncation=True, return_tensors="pt")
    assert values["input_ids"].shape[1] == CONTEXT
    with torch.no_grad():
        cosines = model(**values).logits_per_image.diagonal() / model.logit_scale.exp()
    np.testing.assert_allclose(scores, 100 * cosines.clamp(min=0), rtol=1e-4)
    assert np.ptp(cosines.numpy()) > 1e-3


def test_clips_projected_features_are_an_extractor(clip):
    extractor = features.load(str(clip))
    assert extractor.extract(scenes(2, 0)).shape == (2, 8)


def test_another_folder_is_no_clip(tmp_path):
    with pytest.raises(ValueError, match="is no CLIP model"):
        ClipScorer(str(tmp_path))


def test_captions_are_compared_with_prompts():
    same, near, far = text_similarity(
        ["a red circle", "a round red shape", "a tax report of the year"], ["a red circle"] * 3
    )
    assert same == pytest.approx(1)
    assert far < near < same
