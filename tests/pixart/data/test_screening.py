import io

import pytest
from PIL import Image

from pixart.data.screening import Rejected, decode, resize_and_crop


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(Image.new(mode, (20, 10)), kind)).mode == "RGB"


def test_orientation_is_applied():
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif)).size == (10, 20)


def test_damage_is_a_reason_and_not_a_crash():
    whole = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    for data, reason in (
        (b"", "not an image"),
        (b"GIF89a", "."),
        (whole[:500], "damaged"),
        (b"text" * 99, "not an image"),
    ):
        with pytest.raises(Rejected, match=reason):
            decode(data)
    assert decode(whole).size == (64, 64)


def test_centre_square():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    square = resize_and_crop(image, 50)
    assert square.size == (50, 50)
    assert square.crop((5, 0, 45, 50)).getcolors() == [(40 * 50, (0, 0, 255))]  # the filter softens the edges
