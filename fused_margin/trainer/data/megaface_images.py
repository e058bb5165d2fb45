"""The images that the lists of MegaFace's development kit name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fused_margin.evaluation import MegafaceLists, read_megaface_lists

from .lists import ListImages


@dataclass(frozen=True)
class MegafaceImages:
    """Images of probes and distractors that MegaFace's lists name."""

    lists: MegafaceLists
    probes: Path  # folder
    distractors: Path  # folder
    suffix: str

    @classmethod
    def read(cls, lists: Path, probes: Path, distractors: Path, suffix: str) -> MegafaceImages:
        """Read the lists and check that the images exist. Raises DataError if not."""
        images = cls(read_megaface_lists(lists), probes, distractors, suffix)
        images.lists.check_files(probes, distractors, suffix)
        return images

    def sets(self, image_size: tuple[int, int], channels: int) -> tuple[ListImages, ListImages]:
        """The probes with their identities, and the distractors."""
        lists = self.lists
        none = np.zeros(len(lists.distractors), np.int64)  # their identities are unknown

        def images(root: Path, listed: Sequence[str], labels: np.ndarray, names: Sequence[str]) -> ListImages:
            files = np.array([os.fsencode(f"{path}{self.suffix}") for path in listed])
            return ListImages(root, files, torch.from_numpy(labels), names, image_size, channels)

        return (
            images(self.probes, lists.probes, lists.identity, lists.names),
            images(self.distractors, lists.distractors, none, ["distractor"]),
        )
