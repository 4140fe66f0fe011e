import dataclasses
import hashlib
import io
import math
import pickle
import re
import statistics
import struct
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pixart.config.dataset import ScreeningConfig
from pixart.data.images.screening import (
    Reason,
    Rejected,
    check_uniformity,
    decode,
    decode_downscaled,
    digest,
    measure,
    resize_and_crop,
    thumbnail,
)
from pixart.data.sources.open import open_source
from tests.support.pictures import CONTENT, NEAR_PLAIN, PLAIN, encoded, of_photo

LIMITS = ScreeningConfig()
NO_LIMITS = ScreeningConfig(min_side=1, max_aspect=1000)


def reason_of(data: bytes, limits: ScreeningConfig = NO_LIMITS) -> tuple[Reason, str]:
    """Return the reason and detail for which an image file is rejected."""
    with pytest.raises(Rejected) as caught:
        decode(data, limits)
    return caught.value.reason, caught.value.detail


def scene(size: int = 96) -> Image.Image:
    return decode(next(open_source("demo", max_images=1, image_size=size).read(0, 1)).data, NO_LIMITS)


def noise(mode: str = "RGB", size: tuple[int, int] = (120, 80)) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels).convert(mode)


MODES = {
    "JPEG": ["1", "L", "RGB", "CMYK", "YCbCr"],
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "WEBP": ["L", "RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB"],
    "BMP": ["1", "L", "P", "RGB", "RGBA"],
    "TIFF": ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"],
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_every_mode_is_converted_to_rgb(kind, mode):
    """The expected image is converted by Pillow before it is encoded."""
    few = scene().quantize(16).convert("RGB")
    image = few.convert("L" if mode.startswith("I;16") else mode)
    expected = np.asarray(image.convert("RGB")).astype(int)
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        image = Image.fromarray((np.asarray(image).astype(np.uint16) * 257).astype(f"{order}u2"))
    decoded = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), NO_LIMITS)
    assert (decoded.mode, decoded.size) == ("RGB", few.size)
    assert np.abs(np.asarray(decoded).astype(int) - expected).mean() < (4 if kind == "JPEG" else 1)


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 20, 40))
    image.putpixel((30, 30), (0, 0, 0, 128))
    palette = image.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((39, 0))
    for data in (encoded(image), encoded(image, "WEBP", lossless=True), encoded(palette), encoded(palette, "GIF")):
        decoded = decode(data, NO_LIMITS)
        assert decoded.getpixel((5, 5)) == (0, 0, 200)
        assert decoded.getpixel((39, 0)) == (255, 255, 255)
    assert decode(encoded(image), NO_LIMITS).getpixel((30, 30)) == (127, 127, 127)


def test_modes_of_unknown_value_range_are_unreadable():
    for mode in ("I", "F"):
        reason, detail = reason_of(encoded(Image.new(mode, (40, 40)), "TIFF"))
        assert (reason, detail) == (Reason.UNREADABLE, f"pixels of mode {mode}, whose value range is unknown")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(kind):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated clockwise by 90 degrees for display
    decoded = decode(encoded(image, kind, exif=exif), NO_LIMITS)
    assert decoded.size == (20, 40)
    assert decoded.getpixel((17, 3)) < (60, 60, 60)
    assert decoded.getpixel((3, 3)) > (200, 200, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"garbage", b"II*\0", b"II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0"])
def test_damaged_exif_is_ignored(kind, exif):
    data = encoded(noise(size=(96, 64)), kind, exif=b"Exif\0\0" + exif)
    assert decode(data, NO_LIMITS).size == (96, 64)


def test_first_of_several_jpegs_in_one_file_is_decoded():
    first, second = scene(96), noise(size=(96, 96))
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=90)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert np.abs(np.asarray(decode(data, NO_LIMITS)).astype(int) - np.asarray(first)).mean() < 5
    begin = data.index(b"\xff\xda") + 14
    cut = data[: begin + 200] + data[data.index(b"\xff\xd9", begin) :]
    assert reason_of(cut)[0] == Reason.TRUNCATED


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_decoded(kind):
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    decoded = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), NO_LIMITS)
    assert np.abs(np.subtract(decoded.getpixel((20, 20)), (255, 0, 0))).max() < 5


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "SGI", "DIB", "JPEG2000"])
def test_rare_formats_are_decoded(kind):
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    assert np.array_equal(np.asarray(decode(encoded(scene(), kind, **options), NO_LIMITS)), np.asarray(scene()))


def test_a_large_textual_ppm_is_refused():
    data = b"P3 3000 3000 255 " + b"1 " * 1000
    assert reason_of(data)[0] == Reason.TOO_MANY_PIXELS


def test_other_formats_are_unreadable():
    for kind in ("ICO", "EPS", "IM", "MSP"):
        image = scene().convert("1") if kind == "MSP" else scene()
        assert reason_of(encoded(image, kind))[0] == Reason.UNREADABLE
    for data in (b"", b"GIF89a", b"text" * 99):
        assert reason_of(data)[0] == Reason.UNREADABLE


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((64, 64), None),
        ((63, 200), Reason.TOO_SMALL),
        ((64, 256), None),
        ((257, 64), Reason.EXTREME_ASPECT),
        ((64, 257), Reason.EXTREME_ASPECT),
        ((250, 200), None),
        ((251, 200), Reason.TOO_MANY_PIXELS),
    ],
)
def test_size_limits(size, reason):
    limits = ScreeningConfig(max_pixels=50_000)
    data = encoded(noise(size=size))
    if reason is None:
        assert decode(data, limits).size == size
    else:
        assert reason_of(data, limits) == (reason, f"{size[0]} x {size[1]}")


def test_size_is_checked_before_pixels_are_decoded():
    """The files are truncated after their headers."""
    for kind in ("JPEG", "PNG", "GIF", "BMP"):
        data = encoded(Image.new("RGB", (3000, 3000)), kind)
        header = data[: data.index(b"\xff\xda") + 16] if kind == "JPEG" else data[:900]
        assert reason_of(header, ScreeningConfig(max_pixels=1_000_000))[0] == Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
    ],
)
def test_truncated_files_are_rejected(kind, options):
    """Truncate at 40 positions, from the first byte to the last one that the image needs."""
    data = encoded(noise(), kind, **options)
    reasons = Counter(reason_of(data[:end])[0] for end in np.linspace(0, len(data) - 13, 40).astype(int))
    print(kind, dict(reasons))
    assert set(reasons) <= {Reason.TRUNCATED, Reason.UNREADABLE}
    assert reasons[Reason.TRUNCATED] >= 36


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("size", [(120, 80), (121, 83), (97, 64)])
def test_truncated_jpegs_with_an_end_marker_are_rejected(mode, subsampling, size):
    data = encoded(noise(mode, size), "JPEG", subsampling=subsampling)
    assert decode(data, NO_LIMITS).size == size
    begin = data.index(b"\xff\xda") + 14
    for end in np.linspace(begin, len(data) * 0.9, 20).astype(int):
        assert reason_of(data[:end] + b"\xff\xd9")[0] == Reason.TRUNCATED


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_progressive_jpegs_without_their_last_scans_are_rejected(mode):
    data = encoded(noise(mode), "JPEG", progressive=True)
    ends = [match.start() for match in re.finditer(b"\xff\xda", data)]
    assert len(ends) > 5
    for end in ends[1:]:
        assert reason_of(data[:end] + b"\xff\xd9")[0] == Reason.TRUNCATED


@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_with_a_flat_last_block_are_accepted(progressive):
    """A photo on a white page: its last block is as flat as that of a truncated file."""
    page = Image.new("RGB", (203, 201), "white")
    page.paste(noise(), (20, 20))
    data = encoded(page, "JPEG", progressive=progressive)
    assert decode(data, NO_LIMITS).size == page.size
    assert decode(data + b"trailing bytes", NO_LIMITS).size == page.size
    assert decode(encoded(Image.new("RGB", (203, 201)), "JPEG", progressive=progressive), NO_LIMITS).size == page.size


@pytest.mark.parametrize("progressive", [False, True])
def test_large_jpegs_are_decoded_downscaled(progressive):
    image = scene(size=400).crop((0, 0, 400, 303))
    exif = image.getexif()
    exif[0x0112] = 6
    for options, upright in ({}, image), ({"exif": exif}, image.transpose(Image.Transpose.ROTATE_270)):
        data = encoded(image, "JPEG", progressive=progressive, **options)
        small, size = decode_downscaled(data, NO_LIMITS, lambda *sides: 90 / max(sides))
        assert (small.size, size) == (tuple(-(-side // 4) for side in upright.size), upright.size)
        assert np.abs(np.asarray(small).astype(int) - np.asarray(upright.resize(small.size))).mean() < 4
    assert (
        decode_downscaled(encoded(image), NO_LIMITS, lambda *sides: 0.2)[0].size == image.size
    )  # PNG does not support downscaled decoding


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_truncation_is_detected_in_downscaled_decoding(scale):
    page = Image.new("RGB", (403, 301), "white")
    page.paste(noise("RGB", (400, 280)))
    data = encoded(page, "JPEG")
    begin = data.index(b"\xff\xda") + 14
    assert decode_downscaled(data, NO_LIMITS, lambda *sides: 0.97 / scale)[0].width == -(-403 // scale)
    for end in np.linspace(begin, len(data) * 0.9, 20).astype(int):
        for cut in (data[:end], data[:end] + b"\xff\xd9"):
            with pytest.raises(Rejected) as caught:
                decode_downscaled(cut, NO_LIMITS, lambda *sides: 0.97 / scale)
            assert caught.value.reason == Reason.TRUNCATED


def test_png_checksums_are_verified():
    data = bytearray(encoded(noise()))
    at = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, at)
    data[at + 8 + length] ^= 1
    assert reason_of(bytes(data))[0] == Reason.UNREADABLE


def test_rejected_has_reason_and_detail_and_can_be_pickled():
    rejected = pickle.loads(pickle.dumps(Rejected(Reason.TOO_SMALL, "3 x 4")))
    assert (rejected.reason, rejected.detail, str(rejected)) == (Reason.TOO_SMALL, "3 x 4", "too small: 3 x 4")
    assert str(Rejected(Reason.SOLID_COLOR)) == "plain"
    assert reason_of(b"nothing") == reason_of(b"nothing")


def test_statistics_of_known_images():
    half = Image.new("RGB", (200, 100), "black")
    half.paste("white", (0, 0, 100, 100))
    measured = measure(half)
    assert (measured.width, measured.height) == (200, 100)
    assert measured.brightness == pytest.approx(0.5, abs=0.01)
    assert measured.entropy == pytest.approx(1, abs=0.15)  # resizing blurs the edge
    assert measured.dominant == pytest.approx(0.5, abs=0.01)
    assert measured.flat == pytest.approx(0.5, abs=0.05)
    assert measured.gradient == pytest.approx(255 / 127 / 2, abs=0.02)
    gray = measure(Image.new("RGB", (64, 64), (51, 51, 51)))
    assert dataclasses.astuple(gray)[2:7] == (pytest.approx(0.2), 0, 1, 1, 0)
    ramp = measure(Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3))))
    assert ramp.entropy == pytest.approx(7, abs=0.1)  # of 128 rows
    assert ramp.gradient == pytest.approx(1, abs=0.05)  # 2 levels per row, averaged over two directions


def test_perceptual_hash_matches_its_definition():
    """The expected bits are computed one by one from the DCT-II as a sum of cosines."""
    image = scene(128)
    luma = np.asarray(image.convert("L"), dtype=np.float64).reshape(32, 4, 32, 4).mean(axis=(1, 3))
    positions = range(32)

    def coefficient(u: int, v: int) -> float:
        scale = (2 if u and v else 1 if not (u or v) else 2**0.5) / 32
        return scale * sum(
            luma[y, x] * math.cos(math.pi * (2 * y + 1) * u / 64) * math.cos(math.pi * (2 * x + 1) * v / 64)
            for y in positions
            for x in positions
        )

    low = [coefficient(u, v) for u in range(8) for v in range(8)]
    bits = "".join("1" if value > statistics.median(low) else "0" for value in low)
    assert measure(image).phash == int(bits, 2)


@pytest.mark.slow
def test_screening_of_a_thousand_images(shared_data):
    """At most 1 % of the photos are rejected, and no solid-color or uniform image is accepted."""
    photos = [decode(path.read_bytes(), LIMITS) for path in sorted(shared_data.glob("photos/*/*.jpg"))]
    cases = [("photo", photo) for photo in photos]
    cases += [
        ("photo", of_photo(photo, np.random.default_rng((1, i, j)))) for i, photo in enumerate(photos) for j in range(3)
    ]
    verdicts = Counter((name, verdict(image)) for name, image in cases)
    verdicts += generated_verdicts(616)
    report(verdicts)
    rejected = sum(count for (name, reason), count in verdicts.items() if name == "photo" and reason)
    assert sum(verdicts.values()) == 1000
    assert rejected <= 0.01 * len(cases)


@pytest.mark.slow
def test_screening_of_generated_images():
    verdicts = generated_verdicts(400)
    report(verdicts)
    for (name, reason), _ in verdicts.items():
        assert (reason in (Reason.SOLID_COLOR, Reason.UNIFORM)) == (name not in CONTENT)


def generated_verdicts(count: int) -> Counter:
    kinds = list((PLAIN | NEAR_PLAIN | CONTENT).items())
    verdicts: Counter = Counter()
    for index in range(count):
        name, make = kinds[index % len(kinds)]
        image = make(np.random.default_rng(index))
        verdicts[name, verdict(image)] += 1
    return verdicts


def verdict(image: Image.Image) -> str:
    try:
        check_uniformity(measure(image), LIMITS)
    except Rejected as rejected:
        return rejected.reason
    return ""


def report(verdicts: Counter) -> None:
    for (name, reason), count in sorted(verdicts.items()):
        print(f"{name}: {count} {reason or 'accepted'}")


@pytest.mark.slow
def test_every_demo_scene_is_accepted():
    for item in open_source("demo", max_images=1000, image_size=64).read(0, 1000):
        check_uniformity(measure(decode(item.data, LIMITS)), LIMITS)


def test_uniformity_limits():
    page = Image.new("RGB", (256, 256), "white")
    page.paste("black", (100, 100, 150, 150))
    statistics_of_page = measure(page)
    check_uniformity(statistics_of_page, LIMITS)
    with pytest.raises(Rejected, match=r"^plain: 9\d\.\d\d% of the pixels have one color$"):
        check_uniformity(statistics_of_page, ScreeningConfig(solid_color_fraction=0.9))
    with pytest.raises(Rejected, match=r"^near-plain: 9\d\.\d\d% of the inner area"):
        check_uniformity(statistics_of_page, ScreeningConfig(uniform_area_fraction=0.9))


def test_thumbnail_size_and_format():
    for size in ((64, 64), (300, 100), (20, 30), (2000, 3000)):
        data = thumbnail(noise(size=size))
        small = Image.open(io.BytesIO(data))
        assert (small.format, max(small.size)) == ("JPEG", min(64, max(size)))
        assert len(data) < 2500
    assert len(thumbnail(scene())) < 1200


def test_digest_is_a_sha256_prefix():
    assert digest(b"abc") == bytes.fromhex("ba7816bf8f01cfea414140de5dae2223")
    assert len(digest(b"")) == 16
    assert hashlib.sha256(b"x").digest().startswith(digest(b"x"))


def test_resize_and_crop_keeps_the_center():
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    square = resize_and_crop(image, 50, 50)
    assert square.size == (50, 50)
    assert square.crop((5, 0, 45, 50)).getcolors() == [(40 * 50, (0, 0, 255))]  # the filter blurs the edges


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_complete_jpeg_needs_no_end_marker(options):
    for image in (noise(), scene(), noise("L", (121, 83))):
        data = encoded(image, "JPEG", **options)
        assert decode(data[:-2], NO_LIMITS).tobytes() == decode(data, NO_LIMITS).tobytes()
        for cut in range(6, 40):
            assert reason_of(data[:-cut])[0] == Reason.TRUNCATED


def test_checksums_of_a_png_matter_for_its_pixels_only():
    image = scene()
    image.info.clear()
    data = encoded(image)
    pixels = decode(data, NO_LIMITS).tobytes()
    for kind in (b"tEXt", b"iCCP", b"gAMA", b"tRNS"):
        body = b"damaged" * 300_000
        chunk = struct.pack(">I", len(body)) + kind + body + b"\0\0\0\0"  # not the checksum
        assert decode(data[:33] + chunk + data[33:], NO_LIMITS).tobytes() == pixels
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode(encoded(image.crop((0, 0, 96, 64)), exif=exif), NO_LIMITS).size == (64, 96)
