"""Images for the tests of the screening, each a function of its random generator."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Generator = np.random.Generator


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return the image as the content of a file, by default a PNG."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def size_of(random: Generator) -> tuple[int, int]:
    """Return a random width and height in pixels."""
    return int(random.integers(64, 640)), int(random.integers(160, 256) * random.choice([1, 2]))


def plain(random: Generator) -> Image.Image:
    """Return an image of one random color."""
    width, height = size_of(random)
    width = max(width, height // 3)
    return Image.new("RGB", (width, height), tuple(random.integers(0, 256, 3).tolist()))


def add(image: Image.Image, levels: np.ndarray) -> Image.Image:
    """Return the image plus `levels`, rounded and clipped to 0..255."""
    return Image.fromarray(np.clip(np.rint(np.asarray(image) + levels), 0, 255).astype(np.uint8))


def recompressed(image: Image.Image, random: Generator) -> Image.Image:
    """Return the image after JPEG compression with a random quality from 10 to 95."""
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=int(random.integers(10, 96))))).convert("RGB")


def plain_of_any_colour(random: Generator) -> Image.Image:
    return plain(random)


def plain_as_jpeg(random: Generator) -> Image.Image:
    return recompressed(plain(random), random)


def with_noise(random: Generator) -> Image.Image:
    """Return a solid color with Gaussian noise of 0.5 to 4 levels."""
    image = plain(random)
    return add(image, random.normal(0, random.uniform(0.5, 4), (*image.size[::-1], 3)))


def with_noise_as_jpeg(random: Generator) -> Image.Image:
    return recompressed(with_noise(random), random)


def coordinates(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return x with shape (width,) and y with shape (height, 1) of the pixels, from -1 to 1."""
    return np.linspace(-1, 1, image.width), np.linspace(-1, 1, image.height)[:, None]


def with_vignette(random: Generator) -> Image.Image:
    """Return a solid color with little noise that darkens by 2 to 14 levels towards the corners."""
    image = plain(random)
    x, y = coordinates(image)
    fall = random.uniform(2, 14) * (x**2 + y**2) / 2
    return recompressed(add(image, random.normal(0, 1, (*image.size[::-1], 1)) - fall[..., None]), random)


def with_slight_gradient(random: Generator) -> Image.Image:
    """Return a solid color with a linear gradient of 2 to 12 levels."""
    image = plain(random)
    x, y = coordinates(image)
    angle = random.uniform(0, 2 * np.pi)
    ramp = random.uniform(2, 12) / 2 * (np.cos(angle) * x + np.sin(angle) * y) / 2**0.5
    return add(image, ramp[..., None] * random.choice([-1, 0, 1, 1], 3))


def with_border(random: Generator) -> Image.Image:
    """Return a solid color with noise and a thin border."""
    image = with_noise(random)
    width = int(random.integers(1, max(2, min(image.size) // 25)))
    colour = tuple(random.integers(0, 256, 3).tolist())
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=colour, width=width)
    return recompressed(image, random)


def font(size: float) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont)
    return loaded


def with_logo(random: Generator) -> Image.Image:
    """Return a solid color with noise and a logo near a corner.

    The logo, a word or a disc, has at most 20 % of the width and 11 % of the height.
    """
    image = with_noise(random)
    width, height = image.width * random.uniform(0.05, 0.2), image.height * random.uniform(0.03, 0.11)
    right, low = random.integers(0, 2, 2)
    x = image.width - width - 0.02 * image.width if right else 0.02 * image.width
    y = image.height - height - 0.02 * image.height if low else 0.02 * image.height
    box, colour = (x, y, x + width, y + height), tuple(random.integers(0, 256, 3).tolist())
    if random.random() < 0.5:
        ImageDraw.Draw(image).ellipse(box, fill=colour)
    else:
        mark = Image.new("L", (int(width) + 1, int(height) + 1))
        ImageDraw.Draw(mark).text((0, 0), "© Photo", font=font(height * 0.7), fill=255)
        image.paste(Image.new("RGB", mark.size, colour), (int(x), int(y)), mark)
    return recompressed(image, random)


PLAIN: dict[str, Callable[[Generator], Image.Image]] = {
    "plain": plain_of_any_colour,
    "plain as JPEG": plain_as_jpeg,
}
NEAR_PLAIN: dict[str, Callable[[Generator], Image.Image]] = {
    "noise of 0.5 to 4 levels": with_noise,
    "noise as JPEG": with_noise_as_jpeg,
    "vignette of 2 to 14 levels": with_vignette,
    "gradient of 2 to 12 levels": with_slight_gradient,
    "thin border": with_border,
    "logo in a corner": with_logo,
}


def noise(random: Generator) -> Image.Image:
    """Return strong Gaussian noise on gray."""
    width, height = 256, int(random.integers(128, 400))
    return add(Image.new("RGB", (width, height), "gray"), random.normal(0, random.uniform(30, 90), (height, width, 3)))


def gradient(random: Generator) -> Image.Image:
    """Return a linear gradient between two colors that differ by at least 60 levels in one channel."""
    image = Image.new("RGB", (256, int(random.integers(128, 400))))
    one, other = random.uniform(0, 255, (2, 3))
    channel = random.integers(3)
    other[channel] = one[channel] + (60 if one[channel] < 128 else -60) * random.uniform(1, 2)
    x, y = coordinates(image)
    angle = random.uniform(0, 2 * np.pi)
    share = (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle))) / 2 + 0.5
    return recompressed(add(image, one + share[..., None] * (other - one)), random)


def text_page(random: Generator) -> Image.Image:
    """Return a page with a few to many lines of words, dark on light or light on dark."""
    width = int(random.integers(300, 900))
    image = Image.new(
        "RGB", (width, int(width * random.uniform(0.8, 1.4))), tuple(random.integers(200, 256, 3).tolist())
    )
    draw, size = ImageDraw.Draw(image), random.uniform(10, 24)
    ink = tuple(random.integers(0, 110, 3).tolist())
    for line in range(int(random.integers(3, 30))):
        words = " ".join("".join(random.choice(list("aeinorst"), random.integers(2, 9))) for _ in range(12))
        words = words[: int(width * 0.8 / size * 1.6)]
        draw.text((width * 0.1, width * 0.1 + line * size * 1.5), words, font=font(size), fill=ink)
    if random.random() < 0.3:
        image = image.point(lambda level: 255 - level)
    return recompressed(image, random)


def line_art(random: Generator) -> Image.Image:
    """Return a few thin strokes on an empty background; each starts near the center of the image."""
    side = int(random.integers(200, 1000))
    image = Image.new("RGB", (side, side), tuple(random.integers(225, 256, 3).tolist()))
    ink = tuple(random.integers(0, 120, 3).tolist())
    for _ in range(int(random.integers(2, 9))):
        points = np.cumsum(random.normal(0, side / 12, (12, 2)), axis=0) + side / 2
        ImageDraw.Draw(image).line([tuple(point) for point in points], fill=ink, width=max(1, side // 300))
    return recompressed(image, random)


def silhouette(random: Generator) -> Image.Image:
    """Return a dark object on an even sky, or a pale one on a white wall, of 2 to 30 % of the image side."""
    image = add(Image.new("RGB", (384, 288)), random.uniform(160, 250, 3))
    pale = random.random() < 0.5
    radius = random.uniform(0.03, 0.3) * 288 / 2 + 6
    x, y = random.uniform(110, 270), random.uniform(90, 200)
    shade = np.asarray(image)[0, 0] - 45 if pale else random.uniform(0, 60, 3)
    points = [
        (x + radius * scale * np.cos(angle), y + radius * scale * np.sin(angle))
        for angle, scale in zip(np.linspace(0, 6.28, 15), random.uniform(0.5, 1.4, 15), strict=True)
    ]
    ImageDraw.Draw(image).polygon(points, fill=tuple(np.clip(shade, 0, 255).astype(int).tolist()))
    noisy = add(image.filter(ImageFilter.GaussianBlur(0.7)), random.normal(0, 2, (288, 384, 3)))
    return recompressed(noisy, random)


CONTENT: dict[str, Callable[[Generator], Image.Image]] = {
    "noise": noise,
    "gradient": gradient,
    "text page": text_page,
    "line art": line_art,
    "silhouette": silhouette,
}


def of_photo(photo: Image.Image, random: Generator) -> Image.Image:
    """Return a crop of at least half of each side of a photo, with another scale, brightness and contrast."""
    width, height = (np.array(photo.size) * random.uniform(0.5, 1, 2)).astype(int)
    x, y = int(random.integers(photo.width - width + 1)), int(random.integers(photo.height - height + 1))
    scale = max(random.uniform(0.5, 2), 64 / min(width, height))
    image = photo.crop((x, y, x + width, y + height)).resize((round(width * scale) + 1, round(height * scale) + 1))
    levels = np.asarray(image, dtype=np.float32)
    levels = (levels - levels.mean()) * random.uniform(0.5, 1.3) + levels.mean() * random.uniform(0.5, 1.6)
    return recompressed(add(Image.new("RGB", image.size), levels), random)
