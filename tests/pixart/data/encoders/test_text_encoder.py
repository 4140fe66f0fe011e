import numpy as np
import pytest
import torch

from pixart.data.encoders.text_encoder import TextEncoder, text_dim
from pixart.data.encoders.vae import decode, encode, latent_shape, load_vae


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder("minilm", max_tokens=16, scale=2.0)


def test_states_do_not_depend_on_the_batch(encoder):
    captions = ["a red circle", "a much longer caption of a green square on a white background", ""]
    together, mask = encoder.encode(captions)
    assert together.shape == (3, 16, text_dim("minilm"))
    assert mask.sum(1).tolist()[2] == 2  # an empty text has two special tokens
    for index, caption in enumerate(captions):
        alone, _ = encoder.encode([caption])
        assert torch.allclose(alone[0], together[index], atol=1e-4)
    assert together[~mask].abs().max() == 0


def test_scale_multiplies_states_and_captions_are_truncated(encoder):
    unscaled = TextEncoder("minilm", max_tokens=4, scale=1.0)
    ids, mask = unscaled.tokenize(["one two three four five six"])
    assert ids.shape == (1, 4)
    assert mask.all()
    a, _ = TextEncoder("minilm", max_tokens=4, scale=3.0).encode(["one two"])
    b, _ = unscaled.encode(["one two"])
    assert torch.allclose(a, 3 * b, atol=1e-5)


def test_real_vae_uses_its_pixel_range(shared_data):
    name = str(shared_data / "tiny-vae")
    assert latent_shape(name, 64) == (16, 8, 8)
    vae = load_vae(name)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    latents = encode(vae, images, (-1, 1))
    assert latents.shape == (2, 16, 8, 8)
    assert latents.dtype == np.float16
    gray = np.full((1, 64, 64, 3), 128, np.uint8)
    assert np.abs(decode(vae, encode(vae, gray, (-1, 1)), (-1, 1)).astype(int) - 128).mean() < 12  # gray, not black


def test_missing_model_and_invalid_size_are_errors():
    with pytest.raises(ValueError, match="neither a model folder"):
        latent_shape("/no/such/model", 64)
    with pytest.raises(ValueError, match="multiple"):
        latent_shape("demo", 65)
