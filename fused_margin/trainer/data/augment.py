"""Random augmentation of a batch, each image independently, from an explicit generator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import HIGHEST_QUALITY, AugmentationConfig
from .distortions import adjust_color, affine, compress_jpeg, gaussian_blur, occlude, reduce_resolution

LARGEST_ASPECT = 1 / 0.3  # of an occluding rectangle, as published


def augment(images: Tensor, config: AugmentationConfig, generator: torch.Generator) -> Tensor:
    """Augment a batch of inputs (N, C, H, W), each image independently.

    The distortions are in the order in which a camera makes them: pose, light, objects in front, optics, sensor, file.
    One that is disabled draws no random numbers.
    """
    if not len(images):
        return images  # grid_sample refuses an empty batch

    def uniform(*shape: int) -> Tensor:  # in [-1, 1)
        draw = torch.rand(len(images), *shape, generator=generator, device=images.device)
        return draw * 2 - 1

    if config.rotation or config.scale or config.shear or config.shift:
        angle = torch.deg2rad(config.rotation * uniform())
        stretch = 1 + config.scale * uniform(2)
        images = affine(images, angle, stretch, config.shear * uniform(), config.shift * uniform(2))
    if config.mirror:
        images = torch.where(uniform(1, 1, 1) < 0, images.flip(-1), images)
    if config.brightness or config.contrast or config.saturation:
        strengths = (config.brightness, config.contrast, config.saturation)
        images = adjust_color(images, *(1 + strength * uniform() for strength in strengths))
    if config.occlusion:
        aspect = torch.exp(math.log(LARGEST_ASPECT) * uniform())
        place = (uniform(2) + 1) / 2
        images = occlude(images, config.occlusion * uniform().abs(), aspect, place, uniform(*images.shape[1:]))
    if config.blur:
        images = gaussian_blur(images, config.blur * uniform().abs(), config.blur)
    if config.resolution:
        images = reduce_resolution(images, 1 - config.resolution * uniform().abs())
    if config.noise:
        noise = torch.randn(images.shape, generator=generator, device=images.device)
        images = images + config.noise * uniform(1, 1, 1).abs() * noise
    if config.jpeg:
        images = compress_jpeg(images, HIGHEST_QUALITY - (HIGHEST_QUALITY - config.jpeg) * uniform().abs())
    return images
