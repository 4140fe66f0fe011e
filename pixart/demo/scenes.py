"""The demo dataset: rendered scenes with captions that a small model learns in minutes on a CPU.

A scene is a pure function of (seed, index), so every process can generate scenes in any order.
Lengths are fractions of the image's side; x grows to the right and y downwards.
"""

import math
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "star")  # the class label of a scene is the index of its shape
COLORS = {
    "red": (220, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 235, 50),
    "green": (20, 150, 50),
    "cyan": (40, 215, 225),
    "blue": (25, 60, 225),
    "purple": (135, 30, 170),
    "pink": (255, 135, 195),
}
BACKGROUNDS = {"white": (245, 245, 245), "gray": (135, 135, 135), "black": (20, 20, 20), "brown": (95, 60, 35)}
# Offset of the main shape from the center, and the words of the caption. Offsets are the size of a VAE patch, so that
# moving a shape shifts its latents.
POSITIONS = {
    "center": (0.0, 0.0, "in the center"),
    "left": (-8 / 64, 0.0, "on the left"),
    "right": (8 / 64, 0.0, "on the right"),
    "top": (0.0, -8 / 64, "at the top"),
    "bottom": (0.0, 8 / 64, "at the bottom"),
}

# Number of corners, inner over outer radius, and the clockwise angle from the y axis to a corner.
_POLYGONS = {
    "square": (4, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, math.cos(math.pi / 3), 0.0),
    "star": (5, 0.45, 0.0),
}
_POLYGON_RADIUS = 1.1  # outer radius of polygons relative to circles, so that their areas are similar
_DOT_RADIUS = 0.3  # relative to the main shape; the dot covers less than a fifth of any shape
_CORNER = 23 / 64  # distance of a small shape from the center, along both axes


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallShape:
    """A second, small shape in an empty corner."""

    shape: str
    color: str
    radius: float
    x: float  # of its center
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The content of an image: what its caption states, and jitter that it does not mention."""

    shape: str
    color: str
    background: str
    position: str
    dot: str | None  # color of a dot in the center of the main shape
    small: SmallShape | None
    radius: float
    x: float  # of the main shape's centroid
    y: float
    brightness: float  # multiplies the colors of the shapes
    background_brightness: float


def make_scene(seed: int, index: int) -> Scene:
    """Return scene `index` of the series `seed`.

    A quarter of the scenes have a dot, and another eighth have a small shape. Raises ValueError for negative numbers.
    """
    generator = np.random.default_rng((seed, index))

    def choose(names: list[str]) -> str:
        return names[generator.integers(len(names))]

    shape, color, position = choose(list(SHAPES)), choose(list(COLORS)), choose(list(POSITIONS))
    background = choose(list(BACKGROUNDS))
    other_colors = [name for name in COLORS if name != color]
    offset_x, offset_y, _ = POSITIONS[position]
    extra = generator.random()
    dot = choose(other_colors) if extra < 0.25 else None
    small = None
    if extra >= 0.875:
        small = SmallShape(
            shape=choose(list(SHAPES)),
            color=choose(other_colors),
            radius=float(generator.uniform(5, 6)) / 64,
            x=0.5 + _CORNER * (-1 if offset_x > 0 else 1),  # opposite the main shape, or at the top right
            y=0.5 + _CORNER * (1 if offset_y < 0 else -1),
        )
    shift_x, shift_y = generator.uniform(-0.25, 0.25, size=2) / 64
    return Scene(
        shape=shape,
        color=color,
        background=background,
        position=position,
        dot=dot,
        small=small,
        radius=float(generator.uniform(16, 17.5)) / 64,
        x=float(0.5 + offset_x + shift_x),
        y=float(0.5 + offset_y + shift_y),
        brightness=float(generator.uniform(0.9, 1)),
        background_brightness=float(generator.uniform(0.9, 1)),
    )


def caption(scene: Scene) -> str:
    """Describe a scene in one noun phrase; scenes of equal content have equal captions."""
    dot = f" with {_with_article(scene.dot)} dot" if scene.dot else ""
    small = f" and a small {scene.small.color} {scene.small.shape}" if scene.small else ""
    position = POSITIONS[scene.position][2]
    return f"{_with_article(scene.color)} {scene.shape}{dot} {position} of a {scene.background} background{small}"


def render(scene: Scene, size: int = 64) -> np.ndarray:
    """Render a scene with anti-aliasing, uint8 (size, size, 3)."""
    image = np.empty((size, size, 3))
    image[:] = np.multiply(BACKGROUNDS[scene.background], scene.background_brightness)
    layers = [(scene.shape, scene.color, scene.radius, scene.x, scene.y)]
    if scene.dot:
        layers.append(("circle", scene.dot, scene.radius * _DOT_RADIUS, scene.x, scene.y))
    if scene.small:
        layers.append((scene.small.shape, scene.small.color, scene.small.radius, scene.small.x, scene.small.y))
    centers = np.arange(size) + 0.5
    for shape, color, radius, x, y in layers:
        outer_radius = radius * size * (1.0 if shape == "circle" else _POLYGON_RADIUS)
        distance = signed_distance(shape, centers - x * size, centers[:, None] - y * size, outer_radius)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # share of each pixel that the shape covers
        image += coverage * (np.multiply(COLORS[color], scene.brightness) - image)
    return np.rint(image).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance from points (x, y) to a shape centered at the origin, negative inside.

    `radius` is the distance from the centroid to the corners, in the unit of the points. `x` and `y` broadcast.
    Outside and near a corner, the distance is to the extended sides.
    """
    distance_to_origin = np.hypot(x, y)
    if shape == "circle":
        return distance_to_origin - radius
    corners, inner, first_corner = _POLYGONS[shape]
    # By symmetry, fold the plane onto half of a corner: its side runs from the corner, at angle zero, to the point of
    # inner radius, at angle pi / corners.
    sector = 2 * math.pi / corners
    angle = np.arctan2(x, -y) - first_corner
    angle = np.abs(angle - sector * np.rint(angle / sector))
    end_x, end_y = inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2)  # the side, as a vector
    along, across = distance_to_origin * np.cos(angle) - radius, distance_to_origin * np.sin(angle)
    return (along * end_y - across * end_x) / math.hypot(end_x, end_y)


def unit_area(shape: str) -> float:
    """Return the area of a shape whose `signed_distance` radius is 1."""
    if shape == "circle":
        return math.pi
    corners, inner, _ = _POLYGONS[shape]
    return corners * inner * math.sin(math.pi / corners)


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
