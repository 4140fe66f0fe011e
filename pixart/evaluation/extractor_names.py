"""Names of feature extractors: what they are and the width of their features, without importing torch.

efficientnet-lite0        the packaged ImageNet network; efficientnet-lite0:112 takes an earlier layer of it
FOLDER                    a vision model of transformers, such as DINOv2 or the image encoder of CLIP
FILE.pt, FILE.pth         TorchScript; `inception:FILE` is the state dict of torch-fidelity's Inception
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pixart import records

PACKAGED, INCEPTION = "efficientnet-lite0", "inception:"
PACKAGED_WIDTHS = (16, 24, 40, 80, 112, 192, 320, 1280)
INCEPTION_WIDTH = 2048
SCRIPT_SUFFIXES = (".pt", ".pth")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractorName:
    """A parsed name. `dim` is None where only loading the file shows the width of its features."""

    kind: Literal["efficientnet", "transformers", "torchscript", "inception"]
    path: str  # "" for the packaged network
    dim: int | None
    image_size: int  # side of the images that the network was made for, in pixels; 0 if it resizes them itself


def parse(name: str) -> ExtractorName:
    """Parse the name of an extractor. Raises ValueError if it names none."""
    if name == PACKAGED or name.startswith(f"{PACKAGED}:"):
        return parse_packaged(name)
    if name.startswith(INCEPTION):
        path = Path(name.removeprefix(INCEPTION))
        if not path.is_file():
            raise ValueError(f"evaluation.features={name}: {path} is no file; name torch-fidelity's Inception weights")
        return ExtractorName(kind="inception", path=str(path), dim=INCEPTION_WIDTH, image_size=0)
    path = Path(name)
    if path.is_file() and path.suffix in SCRIPT_SUFFIXES:
        return ExtractorName(kind="torchscript", path=name, dim=None, image_size=0)
    if (path / "config.json").is_file():
        return parse_folder(path)
    raise ValueError(
        f"evaluation.features={name}: is no feature extractor; name {PACKAGED}, the folder of a transformers vision "
        f"model, a TorchScript file, or {INCEPTION}FILE"
    )


def parse_packaged(name: str) -> ExtractorName:
    """Parse `efficientnet-lite0` or `efficientnet-lite0:WIDTH`. Raises ValueError for a width that it has not."""
    width = name.partition(":")[2] or str(PACKAGED_WIDTHS[-1])
    if width not in map(str, PACKAGED_WIDTHS):
        raise ValueError(
            f"evaluation.features={name}: has no layer of width {width!r}; it must be one of "
            f"{', '.join(map(str, PACKAGED_WIDTHS))}"
        )
    return ExtractorName(kind="efficientnet", path="", dim=int(width), image_size=224)


def parse_folder(folder: Path) -> ExtractorName:
    """Return the name of a transformers folder. Raises ValueError if its model reads no images."""
    try:
        config = records.read(folder / "config.json", dict[str, Any])
        vision = config.get("vision_config", config)
        dim = config.get("projection_dim") if "vision_config" in config else vision.get("hidden_size")
        size = vision.get("image_size")
    except (ValueError, AttributeError):
        raise ValueError(f"evaluation.features={folder}: config.json is damaged; restore the model") from None
    if not isinstance(dim, int) or not isinstance(size, int):
        raise ValueError(
            f"evaluation.features={folder}: is no feature extractor, as its config.json names no hidden_size and "
            "image_size; name the folder of a vision model, such as DINOv2 or CLIP"
        )
    return ExtractorName(kind="transformers", path=str(folder), dim=dim, image_size=size)
