"""A folder of identities, root/identity/image.jpg, read as the training goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .base import DataError, Splits, split_by_images
from .decode import SUFFIXES, DecodedImages


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
    counts = np.array([len(files) for files in identities.values()])
    train, test = split_by_images(root, counts, test_fraction, seed)

    def part(kept: list[int]) -> FolderImages:
        paths = [identities[names[i]] for i in kept]
        return FolderImages(root, [names[i] for i in kept], paths, image_size, channels)

    description = f"images of {root}"
    return Splits(part(train), part(test), description=description, test_distortion=None)


class FolderImages(DecodedImages):
    """Images by identity and file name."""

    def __init__(
        self,
        root: str,
        identities: Sequence[str],
        files: Sequence[Sequence[str]],
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        counts = torch.tensor([len(names) for names in files])
        super().__init__(torch.arange(len(files)).repeat_interleave(counts), identities, image_size, channels)
        # One array of relative names: workers share it, where a list would be copied page by page.
        self.files = np.array([name for names in files for name in names])
        self.root = Path(root)

    def source(self, index: int) -> tuple[str, Path]:
        path = self.root / self.identities[int(self.labels[index])] / self.files[index]
        return str(path), path


def _list_identities(root: Path) -> dict[str, list[str]]:
    """File names of each identity that has any, both in order of name."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if names:
            found[folder.name] = names
    return found
