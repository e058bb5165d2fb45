"""A folder of identities, root/identity/image.jpg."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import HIDDEN, SUFFIXES, describe_skipped, image_names, is_hidden

from .base import Splits, split_by_images
from .decode import DecodedImages


def folder_splits(root: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """List the identities and split them; an identity with one image is always for training.

    Hidden and system files and folders, and files of other kinds, are skipped and counted.

    Raises:
        DataError: the folder has no identities, or too few for training and verification.
    """
    identities, skipped = list_identities(Path(root))
    names = list(identities)
    counts = np.array([len(files) for files in identities.values()])
    train, test = split_by_images(root, counts, test_fraction, seed)

    def part(selected: list[int]) -> FolderImages:
        paths = [identities[names[i]] for i in selected]
        return FolderImages(root, [names[i] for i in selected], paths, image_size, channels)

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
        # An array, because workers share its memory, but copy a list of strings page by page.
        self.files = np.array([name for names in files for name in names])
        self.root = Path(root)

    def source(self, index: int) -> tuple[str, Path]:
        path = self.root / self.identities[int(self.labels[index])] / self.files[index]
        return str(path), path


def list_identities(root: Path) -> tuple[dict[str, list[str]], Counter[str]]:
    """Sorted file names of each identity, sorted by identity, and the number of skipped entries by kind.

    Raises:
        DataError: there are none.
    """
    identities: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    with os.scandir(root) as entries:
        folders = sorted(entries, key=lambda entry: entry.name)
    for folder in folders:
        if is_hidden(folder.name):
            skipped[HIDDEN] += 1
        elif not folder.is_dir():
            skipped["files beside the folders of identities"] += 1
        elif names := image_names(folder.path, skipped):
            identities[folder.name] = names
        else:
            skipped["folders without an image"] += 1
    if not identities:
        found = f"; {describe_skipped(skipped)}" if skipped else ""
        raise DataError(
            f"no identities in {root}: expected {root}/identity/image.jpg, images ending in "
            f"{', '.join(SUFFIXES)}{found}"
        )
    return identities, skipped
