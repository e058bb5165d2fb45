"""scikit-learn's handwritten digits: ten identities, some of them for verification."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from .base import Splits, TensorImages, on_gray, split_identities

NAMES = "0123456789"


def digit_splits(image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Split the ten digits into training and test identities; each digit is an identity."""
    images, labels = read_digits(image_size, channels)
    names = list(NAMES)
    train, test = split_identities("digits", len(NAMES), test_fraction, seed)
    return Splits(
        TensorImages.of(images, labels, names, train),
        TensorImages.of(images, labels, names, test),
        description="scikit-learn's handwritten digits; an identity is a digit",
        test_distortion=None,
    )


def read_digits(image_size: tuple[int, int], channels: int) -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, enlarged to (num_images, channels, H, W) uint8, and their digits (num_images,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, image_size, mode="bilinear").round().to(torch.uint8)
    return on_gray(images).expand(-1, channels, -1, -1), torch.from_numpy(digits.target)
