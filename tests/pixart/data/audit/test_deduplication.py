import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from pixart.config.dataset import ScreeningConfig
from pixart.data.audit.deduplication import exact_groups, near_groups
from pixart.data.images.screening import decode, digest, measure
from pixart.data.sources.open import open_source

LIMITS = ScreeningConfig(min_side=32)


def near_groups_reference(hashes: np.ndarray, distance: int) -> list[list[int]]:
    """Compare all pairs, and find connected components by depth-first search."""
    close = np.bitwise_count(hashes[:, None] ^ hashes) <= distance
    visited: set[int] = set()
    groups = []
    for start in range(len(hashes)):
        if start in visited:
            continue
        group, stack = {start}, [start]
        while stack:
            new = set(np.flatnonzero(close[stack.pop()]).tolist()) - group
            group |= new
            stack += new
        visited |= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


def as_lists(groups: list[np.ndarray]) -> list[list[int]]:
    return [group.tolist() for group in groups]


def flip_bits(hashes: np.ndarray, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Flip `counts[i]` random bits of hash i."""
    masks = [sum(1 << int(bit) for bit in random.choice(64, count, replace=False)) for count in counts]
    return hashes ^ np.array(masks, dtype=np.uint64)


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_groups_match_all_pairs(distance, seed):
    """Unrelated hashes, copies of them 0 to 7 bits apart, and copies of those copies; 3,000 in all."""
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 1 << 64, 1000, dtype=np.uint64)
    for _ in range(2):
        hashes = np.concatenate([hashes, flip_bits(hashes[-1000:], random.integers(0, 8, 1000), random)])
    hashes = random.permutation(hashes)
    expected = near_groups_reference(hashes, distance)
    assert len(expected) > 100
    assert max(map(len, expected)) == 3
    assert as_lists(near_groups(hashes, distance)) == expected


def test_near_groups_of_crowded_hashes_match_all_pairs(monkeypatch):
    """Hashes that differ in 14 bits only, so that hundreds share a band, merged in many small batches."""
    monkeypatch.setattr("pixart.data.audit.deduplication.BATCH", 50)
    random = np.random.default_rng(0)
    for bits in (range(14), range(25, 39), range(0, 64, 5)):
        values = random.integers(0, 2, (600, len(bits)), dtype=np.uint64)
        hashes = (values << np.array(bits, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
        for distance in (0, 1):
            assert as_lists(near_groups(hashes, distance)) == near_groups_reference(hashes, distance)


def test_identical_hashes_are_one_group():
    hashes = np.full(200_000, 7, dtype=np.uint64)
    hashes[::2] = np.arange(100_000, dtype=np.uint64) << 40
    groups = near_groups(hashes[1::2])
    assert as_lists(groups) == [list(range(100_000))]


def test_fewer_than_two_hashes_have_no_groups():
    assert near_groups(np.zeros(0, dtype=np.uint64)) == []
    assert near_groups(np.zeros(1, dtype=np.uint64)) == []
    assert exact_groups([]) == []


@pytest.mark.parametrize("distance", [-1, 5])
def test_invalid_distance_is_an_error(distance):
    with pytest.raises(ValueError, match=f"^distance={distance}: must be 0 to 4 bits$"):
        near_groups(np.zeros(2, dtype=np.uint64), distance)


def test_exact_groups():
    digests = [digest(text) for text in (b"a", b"b", b"a", b"c", b"b", b"a")]
    assert as_lists(exact_groups(digests)) == [[0, 2, 5], [1, 4]]
    zeros = [bytes(16), b"\1" + bytes(15), b"\0\1" + bytes(14), bytes(16)]  # numpy drops trailing zeros
    assert as_lists(exact_groups(zeros)) == [[0, 3]]


MODIFICATIONS = {
    "JPEG quality 40": lambda image: recompress(image, 40),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "1.7 times the size": lambda image: image.resize((int(image.width * 1.7), int(image.height * 1.7))),
    "10 % brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "half size, JPEG quality 60": lambda image: recompress(image.resize((image.width // 2, image.height // 2)), 60),
    "2 % cropped": lambda image: image.crop((image.width // 50, 0, image.width, image.height)),
}


def recompress(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return decode(file.getvalue(), LIMITS)


def hashes_of(images) -> np.ndarray:
    return np.array([measure(image).phash for image in images], dtype=np.uint64)


def test_modified_photos_are_duplicates_and_different_photos_are_not(shared_data):
    photos = [decode(path.read_bytes(), LIMITS) for path in sorted(shared_data.glob("photos/*/*.jpg"))]
    original = hashes_of(photos)
    assert near_groups(original) == []
    distances = [int(np.bitwise_count(a ^ b)) for a, b in itertools.combinations(original, 2)]
    print(f"{len(photos)} photos, no two in a group; the closest two are {min(distances)} bits apart")
    for name, modify in MODIFICATIONS.items():
        copies = hashes_of([modify(photo) for photo in photos])
        groups = near_groups(np.concatenate([original, copies]))
        detected = sum(group.tolist() == [group[0], group[0] + len(photos)] for group in groups)
        print(f"{name}: {detected / len(photos):.1%} detected")
        assert len(groups) == detected  # no other photos are merged
        assert detected >= (0.5 if "cropped" in name else 0.9) * len(photos)


@pytest.mark.slow
def test_similar_scenes_are_grouped():
    """Many demo scenes have equal hashes: they differ by jitter, and the hash depends on luma only."""
    items = open_source("demo", max_images=4096, image_size=64).read(0, 4096)
    hashes = hashes_of(decode(item.data, LIMITS) for item in items)
    groups = near_groups(hashes)
    close = (np.sum(np.bitwise_count(hashes[:, None] ^ hashes) <= 3) - 4096) / (4096 * 4095)
    print(f"4,096 scenes: {len(np.unique(hashes))} hashes, {close:.2%} of the pairs within 3 bits")
    print(f"{sum(map(len, groups))} scenes in {len(groups)} groups, the largest of {max(map(len, groups))}")
    assert close < 0.005
    assert max(map(len, groups)) < 200
