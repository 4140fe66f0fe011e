"""Configuration of sampling and of evaluations."""

from dataclasses import dataclass

from pixart.config.limits import require_at_least

DISTANCES = ("fd", "kid", "prdc", "sliced_wasserstein")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How the sample job generates images. Raises ValueError naming the field for a value out of range."""

    steps: int = 20
    """Number of Euler steps of an image."""

    guidance: float = 4.5
    """Scale of classifier-free guidance; 1 samples without guidance."""

    seed: int = 0
    """Random seed of the first image; the k-th image of a run has the seed plus k."""

    count: int = 64
    """Number of prompts or classes taken from the dataset when the command names none."""

    prompts: str = ""
    """File with prompts, as for `sample --file`, that previews of stage 2 show; empty takes captions of the dataset."""

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, count=self.count)
        require_at_least(0, seed=self.seed, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """How an evaluation samples a checkpoint and compares it with a reference.

    Steps, guidance and the size of the images are those of `sample` and of the dataset. Raises ValueError naming the
    field for a value out of range.
    """

    features: str = "efficientnet-lite0"
    """Feature extractor: efficientnet-lite0, or an earlier layer of it by its width as in efficientnet-lite0:112; the
    folder of a vision model of transformers, such as DINOv2 or CLIP; a TorchScript file; or inception:FILE with
    torch-fidelity's weights."""

    feature_image_size: int = 0
    """Side that images are resized to for the feature extractor, in pixels; 0 takes the side that it was made for."""

    distances: str = "fd,kid,prdc,sliced_wasserstein"
    """Distances to compute, separated by commas: fd (Fréchet), kid, prdc (precision, recall, density, coverage) and
    sliced_wasserstein; fd needs more images than the features are wide."""

    num_prompts: int = 2048
    """Number of prompts that are taken from a file or from the dataset; fewer if it has fewer."""

    images_per_prompt: int = 1
    """Number of images of each prompt, from different noise."""

    num_shards: int = 16
    """Number of array elements that share the images of a checkpoint; results do not depend on it."""

    num_reference_images: int = 50_000
    """Largest number of images of the reference; fewer if it has fewer."""

    num_sampled_features: int = 4096
    """Largest number of images whose features are kept for the distances that need single ones, and for intervals."""

    num_bootstraps: int = 100
    """Number of resamplings of the prompts that an interval is computed from."""

    seed: int = 0
    """Random seed; the noise of an image depends on it, on the index of the prompt and on the number of the image."""

    save_images: bool = False
    """Whether to keep every sampled image as a PNG; a judge, or captions of the images, need them and keep them too."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            num_prompts=self.num_prompts,
            images_per_prompt=self.images_per_prompt,
            num_shards=self.num_shards,
            num_bootstraps=self.num_bootstraps,
        )
        require_at_least(2, num_reference_images=self.num_reference_images)
        require_at_least(2, num_sampled_features=self.num_sampled_features)
        require_at_least(0, feature_image_size=self.feature_image_size, seed=self.seed)
        for name in self.distances.split(","):
            if name.strip() not in DISTANCES:
                raise ValueError(f"distances={self.distances}: {name!r} must be one of {', '.join(DISTANCES)}")

    @property
    def distance_names(self) -> tuple[str, ...]:
        """Names of the distances to compute."""
        return tuple(name.strip() for name in self.distances.split(","))
