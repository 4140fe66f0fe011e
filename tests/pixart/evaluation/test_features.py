"""Feature extractors by name, and the CLIP score."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.evaluation import efficientnet, features
from pixart.evaluation.extractor_names import PACKAGED_WIDTHS, parse
from tests.support.evaluation import scenes


class Mean(torch.nn.Module):
    """Returns the mean color of images."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) * (2.0 if return_features else 1.0)


def test_packaged_network_has_the_named_widths():
    assert efficientnet.WIDTHS == PACKAGED_WIDTHS
    extractor = features.load("efficientnet-lite0:40", 32)
    values = extractor.extract(scenes(3, 0))
    assert values.shape == (3, 40)
    assert values.dtype == np.float32
    assert extractor.resize == "32 px, PIL bicubic"
    np.testing.assert_allclose(extractor.extract(scenes(1, 0)), values[:1], atol=1e-5)


def test_torchscript_with_features_like_inception(tmp_path: Path):
    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    extractor = features.load(str(tmp_path / "mean.pt"))
    (image,) = scenes(1, 0)
    np.testing.assert_allclose(extractor.extract([image])[0], 2 * np.asarray(image).mean(axis=(0, 1)), rtol=1e-4)
    assert extractor.resize == "none before the network"


def test_a_transformers_folder(tmp_path: Path):
    """The pooled output of a small vision transformer, with the normalization of its processor."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    model.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path)
    extractor = features.load(str(tmp_path))
    assert (extractor.dim, extractor.image_size) == (16, 32)
    image = scenes(1, 0)[0].resize((32, 32), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = model(pixel_values=pixels).pooler_output.numpy()
    np.testing.assert_allclose(extractor.extract([image]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "is no feature extractor"), ({"hidden_size": 8}, "names no hidden_size and"), ("{", "is damaged")],
)
def test_other_folders_are_refused(tmp_path: Path, config: object, message: str):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message):
        parse(str(tmp_path))


def test_features_of_another_shape_are_refused(tmp_path: Path):
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "identity.pt"))
    with pytest.raises(ValueError, match=r"returns a tensor of shape \(2, 3, 64, 64\)"):
        features.load(str(tmp_path / "identity.pt"))
