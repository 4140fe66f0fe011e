from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pixart.demo.patch_vae import DEMO_VAE, PatchAutoencoder
from pixart.demo.scene_scorer import SceneAccuracy, largest_region, read_scene, score
from pixart.demo.scenes import BACKGROUNDS, Scene, make_scene, render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(5, index) for index in range(512)]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])  # (512, 64, 64, 3)


def test_renders_are_classified_correctly(images: np.ndarray, scenes: list[Scene]):
    assert score(images, scenes) == SceneAccuracy(color=1.0, shape=1.0, total=512)
    assert [read_scene(image).background for image in images] == [scene.background for scene in scenes]


def test_autoencoded_renders_are_classified_correctly(images: np.ndarray, scenes: list[Scene]):
    vae = PatchAutoencoder.from_pretrained(DEMO_VAE)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    accuracy = score(decoded, scenes)
    assert accuracy.color >= 0.97
    assert accuracy.shape >= 0.97


def test_wrong_scenes_score_at_chance(images: np.ndarray, scenes: list[Scene]):
    """Each image is compared with the next scene; the bounds are four standard deviations."""
    accuracy = score(images, scenes[1:] + scenes[:1])
    assert accuracy.color == pytest.approx(1 / 8, abs=4 * (1 / 8 * 7 / 8 / 512) ** 0.5)
    assert accuracy.shape == pytest.approx(1 / 4, abs=4 * (1 / 4 * 3 / 4 / 512) ** 0.5)


def test_classification_is_robust_to_noise_and_blur(images: np.ndarray, scenes: list[Scene]):
    generator = np.random.default_rng(0)
    degraded = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5))) for image in images[:256]]
    degraded = np.clip(degraded + generator.normal(0, 15, np.shape(degraded)), 0, 255).astype(np.uint8)
    accuracy = score(degraded, scenes[:256])
    assert accuracy.color >= 0.97
    assert accuracy.shape >= 0.97


def test_accuracy_counts_every_mistake():
    scene = replace(make_scene(5, 0), shape="circle", color="red", background="white", dot=None, small=None)
    requested = [scene, replace(scene, color="blue"), replace(scene, shape="star"), replace(scene, shape="square")]
    assert score([render(scene)] * 4, requested) == SceneAccuracy(color=0.75, shape=0.5, total=4)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_image_has_no_object_and_counts_as_wrong(background: str):
    image = np.full((64, 64, 3), BACKGROUNDS[background], dtype=np.uint8)
    reading = read_scene(image)
    assert (reading.shape, reading.color, reading.background) == (None, None, background)
    assert score([image], [make_scene(0, 0)]) == SceneAccuracy(color=0.0, shape=0.0, total=1)


def test_largest_region_is_4_connected():
    drawing = """
        ##...###
        ##.#.#.#
        ..#..#.#
        .#...###
    """
    mask = np.array([[pixel == "#" for pixel in row] for row in drawing.split()])
    expected = mask.copy()
    expected[:, :5] = False
    np.testing.assert_array_equal(largest_region(mask), expected)


def test_largest_region_follows_a_long_path():
    """A spiral, one pixel wide; a flood fill verifies that it is connected."""
    mask = np.zeros((33, 33), dtype=bool)
    for ring in range(0, 16, 2):
        mask[ring, max(ring - 1, 0) : 33 - ring] = True
        mask[ring : 33 - ring, 32 - ring] = True
        mask[32 - ring, ring : 33 - ring] = True
        mask[ring + 2 : 33 - ring, ring] = True
    island = np.zeros_like(mask)
    island[16, 16] = True
    stack, visited = [(0, 0)], set()
    while stack:
        row, column = stack.pop()
        if (row, column) in visited or not (0 <= row < 33 and 0 <= column < 33) or not mask[row, column]:
            continue
        visited.add((row, column))
        stack += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    assert len(visited) == mask.sum()  # the spiral is connected
    np.testing.assert_array_equal(largest_region(mask | island), mask)


def test_invalid_arguments_are_errors(images: np.ndarray, scenes: list[Scene]):
    with pytest.raises(ValueError, match="2 images for 3 scenes"):
        score(images[:2], scenes[:3])
    with pytest.raises(ValueError, match="0 images"):
        score([], [])
    with pytest.raises(ValueError, match="must be \\(height, width, 3\\) and uint8"):
        read_scene(images[0] / 255)
    with pytest.raises(ValueError, match="must be \\(height, width, 3\\) and uint8"):
        read_scene(images[0].transpose(2, 0, 1))
