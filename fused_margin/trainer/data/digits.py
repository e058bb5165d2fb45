"""Handwritten digits of scikit-learn: ten identities, some kept for verification."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from .base import Splits, TensorImages, on_gray, split_identities


def digit_splits(image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """1,797 real 8 x 8 images, enlarged; the digit is the identity, whoever wrote it."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, image_size, mode="bilinear").round().to(torch.uint8)
    images = on_gray(images).expand(-1, channels, -1, -1)
    train, test = split_identities(10, test_fraction, seed)
    return Splits(
        TensorImages.of(images, torch.from_numpy(digits.target), list("0123456789"), train),
        TensorImages.of(images, torch.from_numpy(digits.target), list("0123456789"), test),
        description="scikit-learn's handwritten digits; an identity is a digit",
        test_distortion=None,
    )
