"""The pixel range of old and new metadata, and the comparison with a dataset."""

import pytest

from pixart.checkpoint.normalization import Normalization
from pixart.config.latent_space import check_latent_space, recorded_pixel_range

ORIGINAL = [0.177456 / 1.5305] * 16


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"normalization": {"mean": [0.1], "std": [1.0], "pixel_range": [0, 1]}, "dataset": None}, (0, 1)),
        ({"normalization": {"mean": [0.1], "std": [1.0]}, "dataset": None}, (-1, 1)),
        ({"normalization": {"mean": ORIGINAL, "std": [1.0] * 16}, "dataset": None}, (0, 1)),
        ({"normalization": {"mean": ORIGINAL, "std": [1.0] * 16}, "dataset": "/data"}, (-1, 1)),
    ],
)
def test_metadata_without_a_range_has_that_of_its_latents(metadata, expected):
    assert recorded_pixel_range(metadata) == expected


def test_a_fresh_normalization_has_the_default_range():
    assert Normalization(mean=(0.0,), std=(1.0,)).pixel_range == (-1, 1)


def test_mismatch_error_names_both_values_and_the_remedy():
    models = {"vae": "aaaa", "text_encoder": "bbbb"}
    check_latent_space("C", (0, 1), {}, "D", (0, 1), models)
    check_latent_space("C", (0, 1), {"vae": "aaaa"}, "D", (0, 1), models)
    with pytest.raises(ValueError, match=r"C are of pixels in \[0, 1\].* D in \[-1, 1\]; .*data.pixel_range=0,1"):
        check_latent_space("C", (0, 1), {}, "D", (-1, 1), models)
    with pytest.raises(ValueError, match=r"another VAE \(fingerprint cccc\) than .* D \(fingerprint aaaa\); use"):
        check_latent_space("C", (0, 1), {"vae": "cccc"}, "D", (0, 1), models)
