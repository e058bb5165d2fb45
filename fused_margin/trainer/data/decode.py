"""Images decoded and resized when their batch is read; those that cannot be are left out and named."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .base import Batch, ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
# What Pillow raises for a broken file.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DecodedImages(ImageSet):
    """Labelled images that are kept encoded; subclasses say where each is."""

    def __init__(self, labels: Tensor, identities: Sequence[str], image_size: tuple[int, int], channels: int) -> None:
        super().__init__(labels, identities)
        self.image_size, self.channels = image_size, channels

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """Name of an image, and its file or its encoded bytes."""
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch:
        images, kept, unreadable = [], [], []
        for index in indices:
            name, file = self.source(index)
            try:
                images.append(_decode(file, self.image_size, self.channels))
            except UNREADABLE:
                unreadable.append(name)
            else:
                kept.append(index)
        shape = (0, self.channels, *self.image_size)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return Batch(stacked, self.labels[kept], tuple(unreadable))


def _decode(file: Path | BytesIO, image_size: tuple[int, int], channels: int) -> Tensor:
    height, width = image_size
    with Image.open(file) as image:
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        pixels = np.array(image)
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)
