import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from pixart.demo.scenes import (
    BACKGROUNDS,
    COLORS,
    POSITIONS,
    SHAPES,
    caption,
    make_scene,
    render,
    signed_distance,
    unit_area,
)

CENTERED = replace(make_scene(0, 0), position="center", x=0.5, y=0.5, dot=None, small=None, brightness=1.0)


def test_scenes_do_not_change():
    """Stored datasets refer to scenes by (seed, index)."""
    assert [caption(make_scene(2, index)) for index in (1, 7, 8)] == [
        "a pink square with a red dot on the left of a brown background",
        "a red triangle at the bottom of a brown background and a small green star",
        "an orange triangle with a pink dot at the bottom of a white background",
    ]


def test_scenes_do_not_depend_on_order_or_process():
    program = (
        "from pixart.demo.scenes import make_scene, render\n"
        "for index in (7, 3): scene = make_scene(4, index); print(scene, render(scene).astype(int).sum())"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    scenes = {index: make_scene(4, index) for index in (3, 5, 7)}
    expected = [f"{scenes[index]} {render(scenes[index]).astype(int).sum()}" for index in (7, 3)]
    assert printed.splitlines() == expected


def test_scenes_differ_between_indices_and_seeds():
    assert len({make_scene(seed, index) for seed, index in product(range(3), range(100))}) == 300


def test_negative_index_is_an_error():
    with pytest.raises(ValueError, match="non-negative"):
        make_scene(0, -1)


def test_distribution_of_scene_contents():
    scenes = [make_scene(1, index) for index in range(4000)]
    for field, names in (("shape", SHAPES), ("color", COLORS), ("background", BACKGROUNDS), ("position", POSITIONS)):
        counts = Counter(getattr(scene, field) for scene in scenes)
        assert set(counts) == set(names)
        assert min(counts.values()) > 0.8 * len(scenes) / len(names)
    assert np.mean([scene.dot is not None for scene in scenes]) == pytest.approx(0.25, abs=0.03)
    assert np.mean([scene.small is not None for scene in scenes]) == pytest.approx(0.125, abs=0.02)
    assert not any(scene.dot and scene.small for scene in scenes)
    assert all(scene.color not in (scene.dot, scene.small and scene.small.color) for scene in scenes)


def test_caption_mentions_all_content_and_no_jitter():
    dotted = next(scene for index in range(200) if (scene := make_scene(0, index)).dot)
    with_small_shape = next(scene for index in range(200) if (scene := make_scene(0, index)).small)
    assert dotted.dot in caption(dotted).split()
    assert {with_small_shape.small.shape, with_small_shape.small.color} <= set(caption(with_small_shape).split())
    for scene in (dotted, with_small_shape):
        assert {scene.shape, scene.color, scene.background, scene.position} <= set(caption(scene).split())
        assert caption(replace(scene, radius=0.25, x=0.4, y=0.6, brightness=0.95)) == caption(scene)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [64, 96])
def test_drawn_area_and_centroid(shape: str, size: int):
    """The anti-aliased coverage has the area and the centroid of the shape."""
    scene = replace(
        CENTERED, shape=shape, color="yellow", background="black", x=0.45, y=0.55, background_brightness=1.0
    )
    green = render(scene, size)[..., 1].astype(float)
    coverage = (green - BACKGROUNDS["black"][1]) / (COLORS["yellow"][1] - BACKGROUNDS["black"][1])
    outer_radius = scene.radius * size * (1 if shape == "circle" else 1.1)
    assert coverage.sum() == pytest.approx(unit_area(shape) * outer_radius**2, rel=0.02)
    centers = np.arange(size) + 0.5
    assert (coverage.sum(axis=0) @ centers) / coverage.sum() == pytest.approx(0.45 * size, abs=0.2)
    assert (coverage.sum(axis=1) @ centers) / coverage.sum() == pytest.approx(0.55 * size, abs=0.2)


@pytest.mark.parametrize(
    ("shape", "points", "distances"),
    [
        ("circle", [(0, 0), (3, 4)], [-2, 3]),
        ("square", [(0, 0), (2, 0), (0, -3), (2**0.5, 2**0.5)], [-(2**0.5), 2 - 2**0.5, 3 - 2**0.5, 0]),
        ("triangle", [(0, 0), (0, 1), (0, 4), (0, -2), (3**0.5, 1)], [-1, 0, 3, 0, 0]),
        ("star", [(0, -2), (0, 0.9)], [0, 0]),
    ],
)
def test_signed_distance_of_radius_two(shape: str, points: list[tuple[float, float]], distances: list[float]):
    x, y = np.transpose(points)
    np.testing.assert_allclose(signed_distance(shape, x, y, 2.0), distances, atol=1e-9)


def test_median_of_the_object_is_the_main_color_even_with_a_dot():
    for shape, color in product(SHAPES, COLORS):
        scene = replace(CENTERED, shape=shape, color=color, background="gray")
        on_white, on_black = (render(replace(scene, background=name)).astype(int) for name in ("white", "black"))
        covered = (on_white == on_black).all(axis=2)  # pixels without background
        dotted = render(replace(scene, dot="blue" if color != "blue" else "red"))
        assert (dotted != render(scene)).any()
        np.testing.assert_array_equal(np.median(dotted[covered], axis=0), COLORS[color])


def test_shapes_do_not_overlap_or_leave_the_image():
    for index in range(1000):
        scene = make_scene(3, index)
        main = render(replace(scene, small=None)).astype(int)
        background = main[-1, -1]
        covered = (main != background).any(axis=2)
        edges = np.ones_like(covered)
        edges[1:-1, 1:-1] = False
        assert not covered[edges].any(), scene
        if scene.small:
            small = (render(scene) != main).any(axis=2)
            assert small.any()
            assert not (small & covered).any(), scene


def test_colors_and_backgrounds_are_distinct():
    colors = [*COLORS.values(), *BACKGROUNDS.values()]
    distances = np.linalg.norm(np.subtract(np.array(colors)[:, None], np.array(colors)[None]), axis=-1)
    assert distances[~np.eye(len(colors), dtype=bool)].min() > 75
    assert distances[: len(COLORS), : len(COLORS)][~np.eye(len(COLORS), dtype=bool)].min() > 100


def test_image_does_not_depend_on_its_size():
    scene = make_scene(0, 3)
    halved = render(scene, 128).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - render(scene, 64)).mean() < 1
