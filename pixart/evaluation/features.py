"""Feature extractors by name: images to float32 features, with a declared resize and a hash of the weights."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pixart.data.encoders.fingerprint import fingerprint
from pixart.evaluation import efficientnet
from pixart.evaluation.extractor_names import ExtractorName, parse

BATCH_SIZE = 32  # images
HASH_DIGITS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Extractor:
    """A feature extractor. `resize` describes what happens to an image before the network sees it."""

    name: str
    hash: str  # hexadecimal digits that identify the weights
    dim: int
    image_size: int  # pixels per side that images are resized to; 0 leaves that to the network
    network: Callable[[Tensor], Tensor]  # (B, 3, H, W) float32 from 0 to 255 to (B, dim)
    device: str

    @property
    def resize(self) -> str:
        """Description of the resize, as the protocol states it."""
        return f"{self.image_size} px, PIL bicubic" if self.image_size else "none before the network"

    def extract(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Return the features (B, dim), float32, of RGB images."""
        size = (self.image_size, self.image_size)
        resized = [
            image if not self.image_size or image.size == size else image.resize(size, Image.Resampling.BICUBIC)
            for image in images
        ]
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in resized]))
        with torch.no_grad():
            return self.network(pixels.permute(0, 3, 1, 2).to(self.device).float()).float().cpu().numpy()

    def stream(self, images: Iterable[Image.Image]) -> Iterator[np.ndarray]:
        """Yield the features (B, dim) of batches of images, in order."""
        remaining = iter(images)
        while batch := list(islice(remaining, BATCH_SIZE)):
            yield self.extract(batch)


def load(name: str, image_size: int = 0) -> Extractor:
    """Load an extractor by name; `image_size` replaces the side that images are resized to, unless it is 0.

    Raises ValueError if the name is no extractor, or if the network returns other features than (B, dim).
    """
    parsed = parse(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, digest = LOADERS[parsed.kind](parsed, device)
    size = image_size or parsed.image_size
    probe = torch.zeros(2, 3, size or 64, size or 64, device=device)
    with torch.no_grad():
        features = network(probe)
    if features.ndim != 2 or len(features) != 2:
        raise ValueError(
            f"evaluation.features={name}: returns a tensor of shape {tuple(features.shape)} for two images; it must "
            "be (images, features)"
        )
    return Extractor(name=name, hash=digest, dim=features.shape[1], image_size=size, network=network, device=device)


def load_packaged(name: ExtractorName, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    assert name.dim
    return efficientnet.load(name.dim).to(device), file_hash(efficientnet.weights_path())


def load_script(name: ExtractorName, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """Load TorchScript. One whose `forward` has the argument `return_features` is called with it, on uint8 images."""
    try:
        script = torch.jit.load(name.path, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"evaluation.features={name.path}: is no TorchScript; {str(error).splitlines()[0]}") from None
    arguments = {argument.name for argument in script.forward.schema.arguments}
    if "return_features" in arguments:
        return lambda images: script(images.to(torch.uint8), return_features=True), file_hash(name.path)
    return script, file_hash(name.path)


def load_inception(name: ExtractorName, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """Load the Inception network of torch-fidelity, which must be installed, with the weights of a file."""
    torch.load(name.path, weights_only=True)  # torch-fidelity would unpickle any object
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise ValueError(f"evaluation.features=inception:{name.path}: {error}; install torch-fidelity") from None
    network = FeatureExtractorInceptionV3("inception", [str(name.dim)], feature_extractor_weights_path=name.path)
    network.to(device)
    return lambda images: network(images.to(torch.uint8))[0], file_hash(name.path)


def load_transformers(name: ExtractorName, device: str) -> tuple[Callable[[Tensor], Tensor], str]:
    """Load a vision model: CLIP's projected image features, else the pooled output or the first token."""
    from transformers import AutoImageProcessor, AutoModel

    model = AutoModel.from_pretrained(name.path).requires_grad_(False).eval().to(device)
    processor = AutoImageProcessor.from_pretrained(name.path)
    mean, std = (
        torch.tensor(values, device=device)[:, None, None] * 255
        for values in (processor.image_mean, processor.image_std)
    )

    def network(images: Tensor) -> Tensor:
        pixels = (images - mean) / std
        if hasattr(model, "get_image_features"):
            return as_tensor(model.get_image_features(pixel_values=pixels))
        output = model(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state[:, 0] if pooled is None else pooled

    return network, fingerprint(name.path)


def as_tensor(output) -> Tensor:
    """Return the features of `get_image_features`, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


def file_hash(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:HASH_DIGITS]


LOADERS = {
    "efficientnet": load_packaged,
    "torchscript": load_script,
    "inception": load_inception,
    "transformers": load_transformers,
}
