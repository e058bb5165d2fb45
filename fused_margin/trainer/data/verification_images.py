"""The images of a published verification set, read by batch."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch

from fused_margin.evaluation import VerificationSet

from .decode import DecodedImages


class VerificationImages(DecodedImages):
    """All images of a verification set. The label of an image is its row, which identifies the readable ones."""

    def __init__(self, verification: VerificationSet, image_size: tuple[int, int], channels: int) -> None:
        names = [
            f"{verification.source}, image {row}" if isinstance(image, bytes) else image
            for row, image in enumerate(verification.images)
        ]
        super().__init__(torch.arange(len(names)), names, image_size, channels)
        self.images = verification.images

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        image = self.images[index]
        return self.identities[index], BytesIO(image) if isinstance(image, bytes) else Path(image)
