"""A folder of identities, root/identity/image.jpg, read as the training goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .base import DataError, Splits, split_by_images
from .decode import SUFFIXES, DecodedImages
from .listing import HIDDEN, describe_skipped, image_names, is_hidden


def folder_splits(root: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """List the identities and split them; an identity with one image is always for training.

    Hidden and system folders are no identities, and hidden files no images; they and all else that is
    skipped are counted.

    Raises:
        DataError: the folder has too few identities to train and verify on.
    """
    identities, skipped = _list_identities(Path(root))
    if not identities:
        found = f"; {describe_skipped(skipped)}" if skipped else ""
        raise DataError(
            f"no identities in {root}: expected {root}/identity/image.jpg, images ending in "
            f"{', '.join(SUFFIXES)}{found}"
        )
    names = list(identities)
    counts = np.array([len(files) for files in identities.values()])
    train, test = split_by_images(root, counts, test_fraction, seed)

    def part(kept: list[int]) -> FolderImages:
        paths = [identities[names[i]] for i in kept]
        return FolderImages(root, [names[i] for i in kept], paths, image_size, channels)

    description = f"images of {root}"
    return Splits(part(train), part(test), description=description, test_distortion=None, skipped=skipped)


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
        counts = torch.tensor([len(names) for names in files], dtype=torch.int64)
        super().__init__(torch.arange(len(files)).repeat_interleave(counts), identities, image_size, channels)
        # One array of relative names: workers share it, where a list would be copied page by page.
        self.files = np.array([name for names in files for name in names])
        self.root = Path(root)

    def source(self, index: int) -> tuple[str, Path]:
        path = self.root / self.identities[int(self.labels[index])] / self.files[index]
        return str(path), path


def _list_identities(root: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """File names of each identity that has any, both in order of name; and how many of what were skipped."""
    found: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    with os.scandir(root) as entries:
        folders = sorted(entries, key=lambda entry: entry.name)
    for folder in folders:
        if is_hidden(folder.name):
            skipped[HIDDEN] += 1
        elif not folder.is_dir():
            skipped["files beside the folders of identities"] += 1
        elif names := image_names(folder.path, skipped):
            found[folder.name] = names
        else:
            skipped["folders without an image"] += 1
    return found, skipped
