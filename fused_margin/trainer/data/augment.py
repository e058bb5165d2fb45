"""Random affine transform, mirroring, blur and noise of a batch, from an explicit generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AugmentationConfig:
    """Random augmentation of the training images. 0 disables a transform."""

    rotation: float = 10.0
    """Largest rotation in degrees, in either direction."""
    scale: float = 0.1
    """Largest relative change of size, up or down, independently for each axis."""
    shear: float = 0.1
    """Largest shear in either direction: horizontal shift over vertical distance."""
    shift: float = 0.06
    """Largest translation as a share of the image side, in either direction, independently for each axis."""
    blur: float = 0.8
    """Largest standard deviation of the Gaussian blur, in pixels."""
    noise: float = 0.15
    """Largest standard deviation of the Gaussian noise. Black to white is 2."""
    mirror: bool = False
    """Mirror half of the images horizontally. Suitable for faces, not for characters."""

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shear", "shift", "blur", "noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.scale >= 1:
            raise ValueError(f"scale must be below 1, got {self.scale}")


def augment(images: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Augment a batch of inputs (N, C, H, W), each image independently."""
    if not len(images):
        return images  # grid_sample refuses an empty batch

    def uniform(*shape: int) -> Tensor:  # in [-1, 1)
        draw = torch.rand(len(images), *shape, generator=generator, device=images.device)
        return draw * 2 - 1

    if config.rotation or config.scale or config.shear or config.shift:
        angle = torch.deg2rad(config.rotation * uniform())
        stretch = 1 + config.scale * uniform(2)
        images = _affine(images, angle, stretch, config.shear * uniform(), config.shift * uniform(2))
    if config.mirror:
        images = torch.where(uniform(1, 1, 1) < 0, images.flip(-1), images)
    if config.blur:
        images = gaussian_blur(images, config.blur * uniform().abs(), config.blur)
    if config.noise:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + config.noise * uniform(1, 1, 1).abs() * noise
    return images


def _affine(images: Tensor, angle: Tensor, stretch: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    linear = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], dim=1)
    linear = linear.view(-1, 2, 2) / stretch[:, None, :]
    # affine_grid has units of half an image side, which differ between the axes of a non-square image.
    height, width = images.shape[-2:]
    half_sides = torch.tensor([width / 2, height / 2], device=images.device)
    linear = linear * half_sides[None, None, :] / half_sides[None, :, None]
    theta = torch.cat([linear, 2 * shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur each image with its own standard deviation (N,), none above `largest`, in pixels."""
    radius = max(1, round(2.5 * largest))
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.softmax(-(offsets**2) / (2 * sigma[:, None] ** 2).clamp(min=1e-4), dim=1)
    n, channels, height, width = images.shape
    # Each (image, channel) is a group, so that one convolution blurs all.
    kernels = kernels.repeat_interleave(channels, dim=0)
    planes = images.reshape(1, n * channels, height, width)
    planes = F.pad(planes, (radius,) * 4, mode="replicate")
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=n * channels)
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=n * channels)
    return planes.view(images.shape)
