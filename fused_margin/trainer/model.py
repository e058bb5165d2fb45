"""ResNet20 of the RegularFace and SphereFace papers: PReLU, no batch norm, any width and input size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

UNITS = (1, 2, 4, 1)  # residual units of the four stages: 4 + 2 * 8 convolutions


@dataclass(frozen=True)
class ResNet20Config:
    """Size of the network; the shape (stages, units, activations) is the paper's."""

    channels: int = 1
    """Image channels: 1 (grayscale) or 3 (RGB)."""
    image_size: tuple[int, int] = (24, 24)
    """Height and width of the input in pixels; images are rendered at or resized to it."""
    widths: tuple[int, int, int, int] = (16, 32, 64, 128)
    """Channels of the four stages."""
    embedding_size: int = 128
    """Dimensions of the embedding."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if min(self.image_size) < 8:
            raise ValueError(f"image_size must be at least 8 x 8, got {self.image_size}")
        if min(self.widths) < 1:
            raise ValueError(f"widths must be positive, got {self.widths}")
        if self.embedding_size < 2:
            raise ValueError(f"embedding_size must be at least 2, got {self.embedding_size}")

    @classmethod
    def paper(cls) -> ResNet20Config:
        """The published network: 3 x 112 x 96 in, 512-d out."""
        return cls(channels=3, image_size=(112, 96), widths=(64, 128, 256, 512), embedding_size=512)


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


class ResNet20(nn.Module):
    """Images (N, channels, H, W) to embeddings (N, embedding_size)."""

    def __init__(self, config: ResNet20Config) -> None:
        super().__init__()
        height, width = config.image_size
        channels = config.channels
        layers: list[nn.Module] = []
        for stage_width, units in zip(config.widths, UNITS, strict=True):
            layers += [nn.Conv2d(channels, stage_width, 3, stride=2, padding=1)]
            layers += [nn.PReLU(stage_width)]
            layers += [ResidualUnit(stage_width) for _ in range(units)]
            channels, height, width = stage_width, math.ceil(height / 2), math.ceil(width / 2)
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels * height * width, config.embedding_size)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        return self.embedding(self.features(images).flatten(1))


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Initialise so that the depth works without batch norm, as SphereFace's published nets do."""
    if isinstance(module, ResidualUnit):
        for conv in (module.body[0], module.body[2]):
            # Small enough for every unit to start near the identity.
            nn.init.normal_(conv.weight, std=0.01)
    elif isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, a=0.25)  # 0.25: the initial slope of a PReLU
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
