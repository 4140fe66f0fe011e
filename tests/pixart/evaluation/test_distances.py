"""Distances equal those of torch-fidelity, do not depend on the shards, and rank blurred and noisy images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart.evaluation import distances, features, figures
from pixart.evaluation.distances import Kernels, Neighborhoods, frechet
from pixart.evaluation.statistics import FeatureStatistics, load, merge_files, save
from tests.support.evaluation import blurred, mutated, noisy, scenes
from tests.support.fidelity import FOLDER, fidelity
from tests.support.vllm_fixture import needs_vllm

pytestmark = pytest.mark.slow

DIM, COUNT = 48, 300


@pytest.fixture(scope="module")
def extractor() -> features.Extractor:
    return features.load("efficientnet-lite0:24", image_size=64)


def extracted(extractor: features.Extractor, images: list[Image.Image]) -> np.ndarray:
    return np.concatenate(list(extractor.stream(images)))


def statistics_of(values: np.ndarray, capacity: int = 4096) -> FeatureStatistics:
    return FeatureStatistics.empty(values.shape[1], capacity).add(np.arange(len(values)), values)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mixing = random.standard_normal((DIM, DIM)) / 7
    generated, reference = (np.abs(random.standard_normal((COUNT, DIM)) @ mixing * scale) for scale in (1.1, 1.0))
    return generated.astype(np.float32), reference.astype(np.float32)


def test_frechet_distance_of_known_gaussians():
    """For commuting covariances the distance is the sum of squared differences of means and standard deviations."""
    mean, root = np.array([1.0, -2.0, 0.5]), np.diag([2.0, 1.0, 0.5])
    value = distances.frechet_of_moments(mean, np.diag([9.0, 4.0, 1.0]), np.zeros(3), root)
    assert value == pytest.approx((mean**2).sum() + 1 + 1 + 0.25)


def test_moments_are_those_of_numpy(pair):
    statistics = statistics_of(pair[0])
    np.testing.assert_allclose(statistics.mean, pair[0].astype(float).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(pair[0].astype(float), rowvar=False), rtol=1e-9)


@pytest.mark.parametrize("shards", [8, 64])
def test_merged_shards_are_one_set(pair, tmp_path: Path, shards: int):
    """Statistics of 8 or 64 shards, in files, are those of one: moments to 1e-9, the sampled rows exactly."""
    expected = statistics_of(pair[0], capacity=100)
    parts = np.array_split(np.random.default_rng(1).permutation(COUNT), shards)
    paths = [tmp_path / f"{index}.npz" for index in range(shards)]
    for path, rows in zip(paths, parts, strict=True):
        save(FeatureStatistics.empty(DIM, 100).add(rows, pair[0][rows]), path)
    merged = merge_files(paths)
    assert merged.count == COUNT
    np.testing.assert_allclose(merged.total, expected.total, rtol=1e-9)
    np.testing.assert_allclose(merged.outer, expected.outer, rtol=1e-9)
    assert len(merged.rows) == 100
    np.testing.assert_array_equal(merged.rows, expected.rows)
    np.testing.assert_array_equal(merged.features, expected.features)
    reference = statistics_of(pair[1])
    assert frechet(merged, reference) == pytest.approx(frechet(expected, reference), rel=1e-9)


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "0.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"0\.npz: holds no feature statistics"):
        load(tmp_path / "0.npz")


def test_kernel_distance_is_the_unbiased_estimate(pair):
    """KID equals a plain double loop over a few images, and weights count as repeated images."""
    generated, reference = (values[:12].astype(float) for values in pair)

    def kernel(x, y):
        return (x @ y / DIM + 1) ** 3

    def mean(left, right, *, different):
        pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if not different or i != j]
        return np.mean([kernel(left[i], right[j]) for i, j in pairs])

    within = [mean(one, one, different=True) for one in (generated, reference)]
    kernels = Kernels.compute(generated, reference)
    assert kernels.kid() == pytest.approx(sum(within) - 2 * mean(generated, reference, different=False))
    half = np.repeat([1.0, 0.0], 6)
    assert kernels.kid(half) == pytest.approx(Kernels.compute(generated[:6], reference).kid())


def test_neighborhoods_by_sorting(pair, monkeypatch: pytest.MonkeyPatch):
    """All four shares equal a plain computation from sorted distances, also where blocks are small."""
    generated, reference = (values[:40].astype(float) for values in pair)
    monkeypatch.setattr(distances, "BLOCK", 16)
    across = np.linalg.norm(generated[:, None] - reference, axis=2)
    radius = {
        (name, k): np.sort(np.linalg.norm(one[:, None] - one, axis=2), axis=1)[:, k]
        for name, one in (("generated", generated), ("reference", reference))
        for k in (3, 5)
    }
    shares = Neighborhoods.compute(generated, reference)
    np.testing.assert_array_equal(shares.precision, (across <= radius["reference", 3]).any(axis=1))
    np.testing.assert_array_equal(shares.recall, (across <= radius["generated", 3][:, None]).any(axis=0))
    np.testing.assert_allclose(shares.density, (across <= radius["reference", 5]).sum(axis=1) / 5)
    np.testing.assert_array_equal(shares.coverage, (across <= radius["reference", 5]).any(axis=0))


def test_sliced_wasserstein_of_a_shift():
    """A shift by a vector has the squared length of the vector, up to the finite number of directions."""
    values = np.random.default_rng(0).standard_normal((500, 8))
    shift = np.array([0.5] * 8)
    assert distances.sliced_wasserstein(values + shift, values) == pytest.approx((shift**2).sum(), rel=0.1)
    assert distances.sliced_wasserstein(values[:250], values) < 0.3  # sets of different sizes
    assert distances.sliced_wasserstein(values, values) == 0


@pytest.mark.slow
@needs_vllm
@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs torch-fidelity, which `make check` puts into .venv-fidelity")
def test_equal_to_torch_fidelity(vllm_environment: Path, extractor, tmp_path: Path):
    """FD, KID, precision and recall on features of mutated images are those of torch-fidelity."""
    generated, reference = (extracted(extractor, mutated(scenes(60, seed), 256, seed)) for seed in (3, 4))
    np.savez(tmp_path / "features.npz", generated=generated, reference=reference)
    theirs = fidelity(vllm_environment, tmp_path / "features.npz")
    ours = [statistics_of(values) for values in (generated, reference)]
    assert frechet(*ours) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    kid = Kernels.compute(generated, reference).kid()
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    shares = Neighborhoods.compute(generated, reference)
    assert shares.precision.mean() == pytest.approx(theirs["precision"], abs=1e-6)
    assert shares.recall.mean() == pytest.approx(theirs["recall"], abs=1e-6)


def ranking(extractor, same: list[Image.Image], reference: list[Image.Image]) -> dict[str, list[figures.Estimate]]:
    """Return the figures of images of the same distribution, of blurred and of noisy ones."""
    target = statistics_of(extracted(extractor, reference))
    sets = [same, [blurred(image) for image in same], [noisy(0)(image) for image in same]]
    computed = [
        figures.compute(
            statistics_of(extracted(extractor, images)),
            target,
            ("fd", "kid", "sliced_wasserstein"),
            images_per_prompt=1,
            replicates=30,
        )
        for images in sets
    ]
    return {name: [one[name] for one in computed] for name in computed[0]}


def assert_ranked(figures_by_name: dict[str, list[figures.Estimate]]) -> None:
    for name, (same, blur, noise) in figures_by_name.items():
        assert same.value < blur.value < noise.value, name
        assert same.low <= same.value <= same.high
    same, _, noise = figures_by_name["kid"]
    assert abs(same.value) < 0.05 * noise.value
    assert same.low <= 0.001 * noise.value


def test_scenes_are_ranked(extractor):
    """Unseen scenes are nearer to the reference than blurred ones, and these than noisy ones."""
    assert_ranked(ranking(extractor, scenes(160, 1), scenes(160, 2)))


def test_photos_are_ranked(shared_data: Path, extractor):
    """The same holds for mutated copies of photos."""
    photos = [Image.open(path).convert("RGB") for path in sorted((shared_data / "photos").rglob("*.*"))[:96]]
    assert_ranked(ranking(extractor, *(mutated(photos, 192, seed, (0.12, 0.2)) for seed in (1, 2))))


def test_too_few_images_for_a_covariance(pair):
    few = statistics_of(pair[0][:DIM])
    with pytest.raises(ValueError, match=f"{DIM} images: the Fréchet distance needs more than {DIM}"):
        figures.compute(few, statistics_of(pair[1]), ("fd",), images_per_prompt=1, replicates=2)
