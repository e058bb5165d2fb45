"""The residual networks of the SphereFace and RegularFace papers: PReLU, no batch norm, any width and input size."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import ModelConfig

WIDTHS = (64, 128, 256, 512)
# Residual units per stage (SphereFace, arXiv:1704.08063, table 2). The depth is 4 + 2 * their sum.
UNITS = {4: (0, 0, 0, 0), 10: (0, 1, 2, 0), 20: (1, 2, 4, 1), 36: (2, 4, 8, 2), 64: (3, 8, 16, 3)}


class ResidualUnit(nn.Module):
    """x + PReLU(conv(PReLU(conv(x)))), both convolutions 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.PReLU(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResNet(nn.Module):
    """The residual network of SphereFace and RegularFace, from images to embeddings, without batch norm.

    See SphereFace, arXiv:1704.08063, table 2. Images are (N, channels, H, W), embeddings (N, embedding_size).

    Args:
        config: input, depth and width.

    Raises:
        BackboneError: ``config.widths`` does not have four numbers.

    Examples:
        >>> import torch
        >>> from fused_margin.trainer.models import ModelConfig, ResNet
        >>> config = ModelConfig(image_size=(24, 24), depth=4, width=0.1, embedding_size=16)
        >>> backbone = ResNet(config)
        >>> backbone(torch.zeros(2, 1, 24, 24)).shape
        torch.Size([2, 16])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        height, width = config.image_size
        channels = config.channels
        layers: list[nn.Module] = []
        for stage_width, units in zip(config.stage_widths(WIDTHS), UNITS[config.depth], strict=True):
            layers += [nn.Conv2d(channels, stage_width, 3, stride=2, padding=1)]
            layers += [nn.PReLU(stage_width)]
            layers += [ResidualUnit(stage_width) for _ in range(units)]
            channels, height, width = stage_width, math.ceil(height / 2), math.ceil(width / 2)
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels * height * width, config.embedding_size)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, embedding_size) of images (N, channels, H, W), whose pixels are (value - 127.5) / 127.5."""
        return self.embedding(self.features(images).flatten(1))


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """SphereFace's published initialisation, which suits deep networks without batch norm."""
    if isinstance(module, ResidualUnit):
        for layer in module.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)  # small, so that every unit starts near the identity
    elif isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, a=0.25)  # 0.25: the initial slope of a PReLU
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
