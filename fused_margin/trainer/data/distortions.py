"""Distortions of a batch of inputs (N, C, H, W), black -1 and white 1, with parameters (N,) for each image.

Those of torchvision draw one set of parameters for a whole batch, from the global generator.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .base import from_input, to_input, to_picture

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, as in Rec. 601 and JPEG


def affine(images: Tensor, angle: Tensor, stretch: Tensor, shear: Tensor, shift: Tensor) -> Tensor:
    """Rotate by `angle`, in radians, scale by `stretch` (N, 2), shear, and shift by `shift` (N, 2) of the image sides."""
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


def adjust_color(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Multiply the brightness, the differences from the mean gray, and the differences from each pixel's own gray.

    Values out of range are clipped. Without color, the saturation has no effect.
    """
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in (brightness, contrast, saturation))
    images = ((images + 1) * brightness - 1).clamp(-1, 1)  # black stays black
    mean = _gray(images).mean(dim=(2, 3), keepdim=True)
    images = (mean + (images - mean) * contrast).clamp(-1, 1)
    gray = _gray(images)
    return (gray + (images - gray) * saturation).clamp(-1, 1)


def _gray(images: Tensor) -> Tensor:
    """Brightness (N, 1, H, W) of gray or RGB images."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)


def occlude(images: Tensor, area: Tensor, aspect: Tensor, position: Tensor, fill: Tensor) -> Tensor:
    """Replace a rectangle of each image by `fill` (N, C, H, W).

    Random erasing of Zhong et al. (arXiv 1708.04896). The rectangle has the share `area` of the image and a ratio `aspect`
    of height to width, relative to that of the image. It lies inside: a longer side is cut to that of the image.
    `position` (N, 2), from 0 to 1, is where.
    """
    rows, columns = (
        _interval(size, share.clamp(max=1), place)
        for size, share, place in zip(
            images.shape[2:], ((area * aspect).sqrt(), (area / aspect).sqrt()), position.unbind(1), strict=True
        )
    )
    return torch.where((rows[:, :, None] & columns[:, None, :])[:, None], fill, images)


def _interval(size: int, share: Tensor, place: Tensor) -> Tensor:
    """Which of `size` pixels are in an interval of a share (N,) of them, which starts at a place from 0 to 1."""
    length = (share * size).round()
    start = (place * (size - length)).round()
    pixels = torch.arange(size, device=share.device)
    return (pixels >= start[:, None]) & (pixels < (start + length)[:, None])


def reduce_resolution(images: Tensor, scale: Tensor) -> Tensor:
    """Reduce the sides of each image by its own factor `scale`, from 0 to 1, and enlarge it to its size again."""
    height, width = images.shape[2:]
    sizes = torch.stack([scale * height, scale * width], dim=1).round().clamp(min=1).long().tolist()
    results = []
    for image, size in zip(images.split(1), sizes, strict=True):
        small = F.interpolate(image, size, mode="bilinear", antialias=True)
        results.append(F.interpolate(small, (height, width), mode="bilinear"))
    return torch.cat(results)


def compress_jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Write each image as a JPEG of its own quality, from 1 to 100, and read it again."""
    results = []
    for pixels, level in zip(from_input(images).cpu(), quality.tolist(), strict=True):
        file = BytesIO()
        to_picture(pixels).save(file, "JPEG", quality=round(level))
        with Image.open(file) as image:
            results.append(torch.from_numpy(np.array(image)).view(*pixels.shape[1:], -1).permute(2, 0, 1))
    return to_input(torch.stack(results).to(images.device))
