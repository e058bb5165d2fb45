"""A folder of identities, root/identity/image.jpg, read as the training goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .base import Batch, DataError, ImageSet, Splits, split_identities

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")


def folder_splits(root: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """List the identities and split them; an identity with one image is always for training.

    Raises:
        DataError: the folder has too few identities to train and verify on.
    """
    identities = _list_identities(Path(root))
    if not identities:
        raise DataError(
            f"no identities in {root}: expected {root}/identity/image.jpg, images ending in {', '.join(SUFFIXES)}"
        )
    names = list(identities)
    paired = [i for i, name in enumerate(names) if len(identities[name]) >= 2]
    if len(names) < 4 or len(paired) < 2:
        raise DataError(
            f"{root} has {len(names)} identities, {len(paired)} of them with two images or more; "
            "at least two are needed to train on and two more with two images to verify on"
        )
    train, test = split_identities(len(names), test_fraction, seed, eligible=paired)
    if len(train) < 2:
        raise DataError(
            f"{len(test)} of the {len(names)} identities in {root} are for verification, which "
            "leaves fewer than two to train on: lower the test fraction"
        )

    def part(kept: list[int]) -> FolderImages:
        paths = [identities[names[i]] for i in kept]
        return FolderImages(root, [names[i] for i in kept], paths, image_size, channels)

    description = f"images of {root}"
    return Splits(part(train), part(test), description=description, test_distortion=None)


class FolderImages(ImageSet):
    """Images decoded and resized when their batch is read; an unreadable one is left out."""

    def __init__(
        self,
        root: str,
        identities: Sequence[str],
        files: Sequence[Sequence[str]],
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        counts = torch.tensor([len(names) for names in files])
        super().__init__(torch.arange(len(files)).repeat_interleave(counts), identities)
        # One array of relative names: workers share it, where a list would be copied page by page.
        self.files = np.array([name for names in files for name in names])
        self.root, self.image_size, self.channels = Path(root), image_size, channels

    def __getitems__(self, indices: list[int]) -> Batch:
        images, kept, unreadable = [], [], []
        for index in indices:
            path = self.root / self.identities[int(self.labels[index])] / self.files[index]
            try:
                images.append(self._read(path))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
                unreadable.append(str(path))  # what Pillow raises for a broken file
            else:
                kept.append(index)
        shape = (0, self.channels, *self.image_size)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return Batch(stacked, self.labels[kept], tuple(unreadable))

    def _read(self, path: Path) -> torch.Tensor:
        height, width = self.image_size
        with Image.open(path) as image:
            image = image.convert("L" if self.channels == 1 else "RGB")
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BILINEAR)
            pixels = np.array(image)
        return torch.from_numpy(pixels).view(height, width, self.channels).permute(2, 0, 1)


def _list_identities(root: Path) -> dict[str, list[str]]:
    """File names of each identity that has any, both in order of name."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if names:
            found[folder.name] = names
    return found
