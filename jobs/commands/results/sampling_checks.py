"""Checks of a model against the dataset that it samples with."""

from collections.abc import Sequence
from typing import Any

from jobs.tasks.sample import NULL_LABEL

NULL_CLASS = "none"
MAX_LISTED = 8  # class names listed in an error


def check_model(model: dict[str, Any], manifest: dict[str, Any], dataset: str) -> None:
    """Check that the model fits the dataset's VAE and text encoder.

    Raises ValueError if the number of latent channels or the width of the text embeddings differs.
    """
    channels = manifest["latent_shape"][0]
    if model["in_dim"] != channels:
        raise ValueError(f"the model has {model['in_dim']} latent channels, and the VAE of {dataset} has {channels}")
    if model.get("text_dim") not in (None, manifest["text_dim"]):
        raise ValueError(
            f"the model reads text embeddings of width {model['text_dim']}, and those of {dataset} have width "
            f"{manifest['text_dim']}"
        )


def class_index(name: str, class_names: Sequence[str], num_classes: int | None) -> int:
    """Return the index of a class by its name, its index or `none`.

    Where `num_classes` is not known, `none` is NULL_LABEL, and the job checks the index. Raises ValueError for an
    unknown class.
    """
    if name in class_names:
        return list(class_names).index(name)
    if name == NULL_CLASS:
        return NULL_LABEL if num_classes is None else num_classes - 1
    if num_classes is None:
        if not (name.isascii() and name.isdecimal()):
            raise ValueError(f"--class {name}: without a dataset, a class is given by its index, or is {NULL_CLASS}")
        return int(name)
    last = (len(class_names) or num_classes - 1) - 1
    if name.isascii() and name.isdecimal() and int(name) <= last:
        return int(name)
    more = f" and {len(class_names) - MAX_LISTED} more" if len(class_names) > MAX_LISTED else ""
    by_name = f", by name {', '.join(class_names[:MAX_LISTED])}{more}" if class_names else ""
    raise ValueError(f"--class {name}: the classes are 0 to {last}{by_name}, and {NULL_CLASS}")
