"""500 damaged, inconsistent and hostile image files, and what the screening does with them.

`python -m tests.support.mutations` prints a JSON line for each file, and at the end one with the peak memory in MiB. An
image that takes longer than 5 seconds ends the process with a traceback, even from inside a decoder.
"""

import faulthandler
import json
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pixart.config.dataset import ScreeningConfig
from pixart.data.images.screening import Rejected, check_uniformity, decode, measure
from pixart.data.sources.open import open_source
from tests.support.pictures import add, encoded

COUNT = 500
SECONDS = 5
LIMITS = ScreeningConfig()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a PNG chunk with its length and CRC-32."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, extra: bytes = b"", rows: bytes = b"") -> bytes:
    """Return a PNG with this header; without `rows`, all pixels are zero and compress a thousandfold."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    if not rows:
        packer, row = zlib.compressobj(9), bytes(1 + (width * bits * {0: 1, 2: 3, 3: 1, 6: 4}[colour] + 7) // 8)
        rows = b"".join(packer.compress(row) for _ in range(min(height, 30_000))) + packer.flush()
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def rle_bmp(width: int, height: int, content: bytes) -> bytes:
    """Return an 8-bit BMP with a palette of 256 greens and the run-length encoded pixels `content`."""
    palette = b"".join(bytes((0, level, 40, 0)) for level in range(256))
    offset = 14 + 40 + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(content), 0, 0, offset)
    return (
        head + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0) + palette + content
    )


def base_files() -> dict[str, bytes]:
    """Return intact files of every supported format by name; most show a rendered scene with some noise."""
    random = np.random.default_rng(0)
    scene = Image.fromarray(np.asarray(_scene(0)))
    noisy = add(scene, random.normal(0, 8, (96, 96, 3)))
    frames = [_scene(index) for index in range(1, 5)]
    lines = b"".join(b"\x60" + bytes([line]) + b"\0\0" for line in range(96)) + b"\0\1"
    animated = {"save_all": True, "append_images": frames}
    return {
        "jpeg": encoded(noisy, "JPEG"),
        "progressive": encoded(noisy, "JPEG", progressive=True),
        "cmyk": encoded(noisy.convert("CMYK"), "JPEG"),
        "png": encoded(noisy),
        "png-palette": encoded(scene.quantize(16)),
        "apng": encoded(scene, "PNG", **animated),
        "gif": encoded(noisy.quantize(64), "GIF"),
        "gif-frames": encoded(scene, "GIF", **animated),
        "webp": encoded(noisy, "WEBP"),
        "webp-lossless": encoded(noisy, "WEBP", lossless=True),
        "webp-frames": encoded(scene, "WEBP", **animated),
        "bmp": encoded(noisy, "BMP"),
        "bmp-rle": rle_bmp(96, 96, lines),
        "tiff": encoded(noisy, "TIFF"),
        "tiff-lzw": encoded(noisy, "TIFF", compression="tiff_lzw"),
        "tiff-deflate": encoded(noisy, "TIFF", compression="tiff_adobe_deflate"),
        "tiff-jpeg": encoded(noisy, "TIFF", compression="jpeg"),
    }


def _scene(index: int) -> Image.Image:
    item = next(open_source("demo", max_images=index + 1, image_size=96).read(index, index + 1))
    return decode(item.data, LIMITS)


def patched(data: bytes, at: int, layout: str, *values: int) -> bytes:
    """Return a copy of `data` with `values` packed at byte `at`; `layout` is a format string of `struct`."""
    changed = bytearray(data)
    struct.pack_into(layout, changed, at, *values)
    return bytes(changed)


SIZES = [(0, 0), (1, 1), (96, 30_000), (97, 96), (96, 192), (6000, 6000), (30_000, 30_000), (65_535, 65_535)]


def lying_sizes(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield files whose headers state other dimensions; PNG checksums are recomputed except in one variant."""
    for width, height in SIZES:
        size = f"{width}x{height}"
        for name, marker in (("jpeg", b"\xff\xc0"), ("progressive", b"\xff\xc2"), ("cmyk", b"\xff\xc0")):
            yield f"{name} says {size}", patched(files[name], files[name].index(marker) + 5, ">HH", height, width)
        for name in ("png", "png-palette"):
            changed = patched(files[name], 16, ">II", width, height)
            yield f"{name} says {size}", patched(changed, 29, ">I", zlib.crc32(changed[12:29]))
        yield f"png says {size}, checksum wrong", patched(files["png"], 16, ">II", width, height)
        for name in ("gif", "gif-frames"):
            yield f"{name} says {size}", patched(files[name], 6, "<HH", width, height)
        frame = files["gif"].index(b",", 13 + 3 * 64)
        yield f"gif's frame says {size}", patched(files["gif"], frame + 5, "<HH", width, height)
        yield f"webp says {size}", patched(files["webp"], 26, "<HH", width & 0x3FFF, height & 0x3FFF)
        bits = max(width - 1, 0) & 0x3FFF | (max(height - 1, 0) & 0x3FFF) << 14
        yield f"webp-lossless says {size}", patched(files["webp-lossless"], 21, "<I", bits)
        canvas = (struct.pack("<I", max(side - 1, 0))[:3] for side in (width, height))
        yield f"webp-frames says {size}", files["webp-frames"][:24] + b"".join(canvas) + files["webp-frames"][30:]
        for name in ("bmp", "bmp-rle"):
            yield f"{name} says {size}", patched(files[name], 18, "<ii", width, height)
        for name in ("tiff", "tiff-lzw", "tiff-jpeg"):
            yield f"{name} says {size}", tiff_tags(files[name], {256: width, 257: height})


def tiff_tags(data: bytes, values: dict[int, int]) -> bytes:
    """Return a little-endian TIFF in which these tags have other integer values."""
    (directory,) = struct.unpack_from("<I", data, 4)
    for entry in range(struct.unpack_from("<H", data, directory)[0]):
        at = directory + 2 + 12 * entry
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in values:
            data = patched(data, at + 2, "<HII", 4, 1, values[tag])
    return data


def lying_lengths(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield files whose parts have wrong lengths or offsets, from zero to beyond the end of the file."""
    for length in (0, 1, 0x7FFF, 0xFFFF):
        for name, marker in (("jpeg", b"\xff\xdb"), ("jpeg", b"\xff\xc4"), ("progressive", b"\xff\xda")):
            at = files[name].index(marker) + 2
            yield f"{name}: segment {marker.hex()} of {length}", patched(files[name], at, ">H", length)
        yield (
            f"tiff of {length} tags",
            patched(files["tiff"], struct.unpack_from("<I", files["tiff"], 4)[0], "<H", length),
        )
    for length in (0, 13, 0x7FFF_FFFF, 0xFFFF_FFFF):
        for part in (b"IHDR", b"IDAT", b"IEND"):
            yield f"png: {part} of {length}", patched(files["png"], files["png"].index(part) - 4, ">I", length)
        yield f"webp of {length}", patched(files["webp"], 4, "<I", length)
        yield f"webp: frame of {length}", patched(files["webp"], 16, "<I", length)
        yield f"bmp: pixels at {length}", patched(files["bmp"], 10, "<I", length)
        yield f"bmp: header of {length}", patched(files["bmp"], 14, "<I", length)
        yield f"bmp: {length} colours", patched(files["bmp-rle"], 46, "<I", length)
        yield f"tiff: directory at {length}", patched(files["tiff"], 4, "<I", length)
        for tag in (258, 273, 277, 278, 279):
            yield f"tiff: tag {tag} is {length}", tiff_tags(files["tiff-lzw"], {tag: length})


def decompression_bombs(files: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Yield small files that require much memory or time to decode."""
    yield "png of 900 million pixels", png(30_000, 30_000, bits=1, colour=0)
    yield "png of 48 million pixels", png(6900, 6900, bits=8, colour=6)
    yield "png of 48 million bits", png(6900, 6900, bits=1, colour=0)
    yield "png of 2**31 pixels a side", png(2**31 - 1, 2**31 - 1, rows=b"x")
    huge = zlib.compress(bytes(200_000_000), 9)
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        yield f"png: {kind.decode()} decompression bomb", png(96, 96, extra=png_chunk(kind, head + huge))
    yield "png: many texts", png(96, 96, extra=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6))) * 100)
    yield "png: 100,000 chunks", png(96, 96, extra=png_chunk(b"teSt", b"") * 100_000)
    yield "png of too few rows", png(96, 9600 // 96 * 3, rows=zlib.compress(bytes(289 * 20)))
    yield "gif of a huge screen", patched(files["gif"], 6, "<HH", 65_535, 65_535)
    yield "gif of a large screen", patched(files["gif"], 6, "<HH", 7000, 7000)
    frames = files["gif-frames"]
    yield "gif of 20,000 frames", frames[:-1] + frames[frames.index(b"!\xf9") : -1] * 5000 + b";"
    yield (
        "gif: a comment of 500,000 blocks",
        files["gif"][: 13 + 192] + b"!\xfe" + b"\1a" * 500_000 + b"\0" + frames[205:],
    )
    still = [Image.new("RGB", (96, 96), (level, 0, 0)) for level in range(250)]
    yield "apng of 250 frames", encoded(still[0], "PNG", save_all=True, append_images=still[1:])
    yield "apng says 2**31 frames", _with_frames(files["apng"], 2**31)
    yield "webp of 250 frames", encoded(still[0], "WEBP", save_all=True, append_images=still[1:], lossless=True)
    large = Image.new("RGB", (6900, 6900), (200, 90, 40))
    slow = encoded(large, "JPEG", progressive=True, quality=5)
    last = slow[slow.rindex(b"\xff\xda") : -2]
    yield "jpeg of 30 scans", slow[:-2] + last * 20 + b"\xff\xd9"
    yield "jpeg of 1,000 scans", slow[:-2] + last * 1000 + b"\xff\xd9"
    yield "jpeg of 1,000 scans, small", files["progressive"][:-2] + last * 1000 + b"\xff\xd9"
    yield "jpeg of zeros", b"\xff\xd8\xff" + bytes(5_000_000)
    yield "jpeg of 48 million pixels", encoded(large, "JPEG")
    yield "webp of 48 million pixels", encoded(large, "WEBP", method=0)
    yield "webp of 48 million transparent pixels", encoded(large.convert("RGBA"), "WEBP", lossless=True, quality=0)
    yield "bmp-rle of 48 million pixels", rle_bmp(6900, 6900, b"\1\5\0\0" * 6900 + b"\0\1")
    yield "bmp-rle of 4 million pixels", rle_bmp(2000, 2000, b"\1\5\0\0" * 2000 + b"\0\1")
    yield "tiff of 48 million pixels", encoded(large, "TIFF", compression="tiff_lzw")
    (directory,) = struct.unpack_from("<I", files["tiff"], 4)
    after = directory + 2 + 12 * struct.unpack_from("<H", files["tiff"], directory)[0]
    yield "tiff that is its own next", patched(files["tiff"], after, "<I", directory)


def _with_frames(data: bytes, count: int) -> bytes:
    at = data.index(b"acTL") + 4
    control = struct.pack(">II", count, 0)
    return data[:at] + control + struct.pack(">I", zlib.crc32(b"acTL" + control)) + data[at + 12 :]


def damaged(files: dict[str, bytes], random: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield damaged files endlessly: flipped bits, a truncation, and a block overwritten, removed or repeated."""
    while True:
        for name, data in files.items():
            flips = bytearray(data)
            for at in random.integers(0, 8 * len(data), int(random.choice([1, 2, 5, 20]))):
                flips[at // 8] ^= 1 << at % 8
            yield f"{name}: bits flipped", bytes(flips)
            yield f"{name}: cut", data[: random.integers(len(data))]
            start, size = int(random.integers(len(data))), int(random.integers(1, 200))
            rest = data[start + size :]
            yield f"{name}: overwritten", data[:start] + random.bytes(size) + rest
            yield f"{name}: taken out", data[:start] + rest
            yield f"{name}: repeated", data[: start + size] + data[start:]


def mutated_images() -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of 500 files, the same ones in every run."""
    files = base_files()
    chosen = [*lying_sizes(files), *lying_lengths(files), *decompression_bombs(files)]
    yield from chosen
    yield from (
        case for case, _ in zip(damaged(files, np.random.default_rng(0)), range(COUNT - len(chosen)), strict=False)
    )


def peak_kib() -> int:
    """Return the peak memory of this process in KiB; `getrusage` would include the process it was forked from."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))


def main() -> None:
    resident = peak_kib()
    for name, data in mutated_images():
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        begun = time.perf_counter()
        try:
            check_uniformity(measure(decode(data, LIMITS)), LIMITS)
            reason, detail = "kept", ""
        except Rejected as rejected:
            reason, detail = rejected.reason, rejected.detail
        seconds = time.perf_counter() - begun
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"name": name, "reason": reason, "detail": detail, "seconds": seconds}), flush=True)
    peak = peak_kib()
    print(json.dumps({"peak_mib": peak / 1024, "before_mib": resident / 1024}))


if __name__ == "__main__":
    sys.exit(main())
