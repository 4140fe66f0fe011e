from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from pixart.demo.patch_vae import DEMO_VAE, PatchAutoencoder
from pixart.demo.scene_scorer import Counts, count, largest_region, read_scene
from pixart.demo.scenes import BACKGROUNDS, Scene, make_scene, render


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(5, index) for index in range(512)]


@pytest.fixture(scope="module")
def images(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])  # (512, 64, 64, 3)


def test_renders_are_read_right(images: np.ndarray, scenes: list[Scene]):
    assert count(images, scenes) == Counts(color=1.0, shape=1.0, total=512)
    assert [read_scene(image).background for image in images] == [scene.background for scene in scenes]


def test_autoencoded_renders_are_read_right(images: np.ndarray, scenes: list[Scene]):
    vae = PatchAutoencoder.from_pretrained(DEMO_VAE)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    decoded = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    counts = count(decoded, scenes)
    assert counts.color >= 0.97
    assert counts.shape >= 0.97


def test_other_scenes_are_read_at_chance(images: np.ndarray, scenes: list[Scene]):
    """Each image against the next one's scene; the bounds are four standard deviations."""
    counts = count(images, scenes[1:] + scenes[:1])
    assert counts.color == pytest.approx(1 / 8, abs=4 * (1 / 8 * 7 / 8 / 512) ** 0.5)
    assert counts.shape == pytest.approx(1 / 4, abs=4 * (1 / 4 * 3 / 4 / 512) ** 0.5)


def test_noise_and_blur_change_little(images: np.ndarray, scenes: list[Scene]):
    generator = np.random.default_rng(0)
    ragged = [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5))) for image in images[:256]]
    ragged = np.clip(ragged + generator.normal(0, 15, np.shape(ragged)), 0, 255).astype(np.uint8)
    counts = count(ragged, scenes[:256])
    assert counts.color >= 0.97
    assert counts.shape >= 0.97


def test_shares_count_each_mistake():
    scene = replace(make_scene(5, 0), shape="circle", color="red", background="white", dot=None, small=None)
    asked = [scene, replace(scene, color="blue"), replace(scene, shape="star"), replace(scene, shape="square")]
    assert count([render(scene)] * 4, asked) == Counts(color=0.75, shape=0.5, total=4)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_picture_has_no_object_and_counts_as_wrong(background: str):
    image = np.full((64, 64, 3), BACKGROUNDS[background], dtype=np.uint8)
    reading = read_scene(image)
    assert (reading.shape, reading.color, reading.background) == (None, None, background)
    assert count([image], [make_scene(0, 0)]) == Counts(color=0.0, shape=0.0, total=1)


def test_largest_region_is_connected_by_sides():
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
    """A spiral through the whole mask, one pixel wide, against a flood fill."""
    mask = np.zeros((33, 33), dtype=bool)
    for ring in range(0, 16, 2):
        mask[ring, max(ring - 1, 0) : 33 - ring] = True
        mask[ring : 33 - ring, 32 - ring] = True
        mask[32 - ring, ring : 33 - ring] = True
        mask[ring + 2 : 33 - ring, ring] = True
    island = np.zeros_like(mask)
    island[16, 16] = True
    waiting, reached = [(0, 0)], set()
    while waiting:
        row, column = waiting.pop()
        if (row, column) in reached or not (0 <= row < 33 and 0 <= column < 33) or not mask[row, column]:
            continue
        reached.add((row, column))
        waiting += [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
    assert len(reached) == mask.sum()  # the spiral is one piece
    np.testing.assert_array_equal(largest_region(mask | island), mask)


def test_misuse_is_named(images: np.ndarray, scenes: list[Scene]):
    with pytest.raises(ValueError, match="2 images for 3 scenes"):
        count(images[:2], scenes[:3])
    with pytest.raises(ValueError, match="0 images"):
        count([], [])
    with pytest.raises(ValueError, match="must be \\(height, width, 3\\) of uint8"):
        read_scene(images[0] / 255)
    with pytest.raises(ValueError, match="must be \\(height, width, 3\\) of uint8"):
        read_scene(images[0].transpose(2, 0, 1))
