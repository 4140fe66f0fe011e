"""Similarity of a prompt with its image: by CLIP, and by a caption of the image and MiniLM."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from pixart.data.encoders.text_encoder import load_text_model
from pixart.evaluation.features import as_tensor

CLIP_SCALE = 100.0  # of the CLIP score (Hessel et al., arXiv:2104.08718), as published figures have it
BATCH_SIZE = 64


class ClipScorer:
    """The CLIP score: 100 max(0, cosine) of the embeddings of image and prompt."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoProcessor, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(folder).requires_grad_(False).eval()
            self.processor = AutoProcessor.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ValueError(f"--clip {folder}: is no CLIP model; {str(error).splitlines()[0]}") from None
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """Return the score (B,) of each image with its prompt; prompts are truncated to CLIP's context."""
        values = self.processor(
            text=list(prompts), images=list(images), padding=True, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        with torch.no_grad():
            seen = as_tensor(self.model.get_image_features(pixel_values=values["pixel_values"]))
            read = as_tensor(
                self.model.get_text_features(input_ids=values["input_ids"], attention_mask=values["attention_mask"])
            )
        return CLIP_SCALE * torch.cosine_similarity(seen, read).clamp(min=0).cpu().numpy()


def text_similarity(captions: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """Return the cosine similarity (B,) of MiniLM's sentence embeddings of captions and prompts."""
    tokenizer, model = load_text_model("minilm")

    def embed(texts: Sequence[str]) -> torch.Tensor:
        parts = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = tokenizer(
                list(texts[start : start + BATCH_SIZE]),
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            with torch.no_grad():
                states = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            parts.append((states * mask).sum(1) / mask.sum(1))  # the mean over tokens, as the model was trained
        return torch.cat(parts)

    if not captions:
        return np.zeros(0)
    return torch.cosine_similarity(embed(captions), embed(prompts)).numpy()
