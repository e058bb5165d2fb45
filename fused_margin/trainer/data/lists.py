"""A list of images: `path label`, `path<TAB>label` or mxnet's `number<TAB>label<TAB>path`, relative to its folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np
from torch import Tensor

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import SYSTEM_NAMES, describe_skipped, is_image, read_fields, skip_reason

from .base import Splits, split_listed
from .decode import DecodedImages

CHECKED_FILES = 100  # number of listed files whose existence is checked before training


def list_splits(path: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Read the list and split its identities; an identity with a single image is always for training.

    Raises:
        DataError: a line has another format, no image is found, or there are too few identities.
    """
    skipped: Counter[str] = Counter()
    files, labels, names = read_list(Path(path), skipped)
    root = Path(path).parent
    train, test = (
        ListImages(root, files[part.rows], part.labels, part.identities, image_size, channels)
        for part in split_listed(path, labels, names, test_fraction, seed)
    )
    return Splits(train, test, description=f"images listed in {path}", test_distortion=None, skipped=skipped)


def read_list(path: Path, skipped: Counter[str] | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Relative paths (num_images,) as encoded names, labels (num_images,), and the name of each label.

    A label is any text. Labels are numbered in order of first appearance. A line that begins with # is a comment,
    unless it names a file. A first line without an image suffix and without an existing file is a heading. Comments, headings,
    files with other suffixes and system files are skipped and counted.

    Args:
        skipped: counts the skipped lines by kind.

    Raises:
        DataError: the list is not UTF-8, a line has another format, or no image is listed or found.
    """
    skipped = Counter() if skipped is None else skipped
    first = True
    files: list[bytes] = []
    labels: list[int] = []
    numbers: dict[str, int] = {}
    for number, fields in read_fields(path):
        if fields[0].startswith("#") and not (path.parent / fields[0]).is_file():
            skipped["comment lines"] += 1
            continue
        if len(fields) == 3 and (label := _whole_number(fields[1])) and fields[0].isdecimal():
            fields = [fields[2], label]  # the format of mxnet's im2rec
        if len(fields) != 2 or not all(fields):
            raise DataError(
                f"{path}, line {number}: expected a path and a label, with a tab between them if the path "
                f"has spaces, got {' '.join(fields)[:200]!r}"
            )
        heading, first = first, False
        if _is_system_file(fields[0]):
            skipped["lines of system files"] += 1
            continue
        if not is_image(fields[0]):
            exists = (path.parent / fields[0]).is_file()
            if heading and not exists:
                skipped["heading lines"] += 1
                continue
            if PurePath(fields[0]).suffix:
                skipped[skip_reason(fields[0])] += 1
                continue
            if not exists:
                raise DataError(f"{path}, line {number}: there is no file {fields[0][:200]!r}, and it has no suffix")
        files.append(os.fsencode(fields[0]))
        labels.append(numbers.setdefault(fields[1], len(numbers)))
    if not files:
        found = f"; {describe_skipped(skipped)}" if skipped else ""
        raise DataError(f"{path} lists no images{found}")
    some = files[:: -(-len(files) // CHECKED_FILES)]
    if not any((path.parent / os.fsdecode(file)).is_file() for file in some):
        raise DataError(
            f"none of {len(some)} listed images that were checked exists, for example {path.parent / os.fsdecode(some[0])}: "
            f"paths in {path} are relative to its folder"
        )
    # An array, because workers share its memory, but copy a list of strings page by page.
    return np.array(files), np.array(labels), list(numbers)


def _whole_number(text: str) -> str | None:
    """mxnet's label 3.000000 as 3; None for other text."""
    whole, _, fraction = text.partition(".")
    return whole if whole.isdecimal() and not fraction.strip("0") else None


def _is_system_file(name: str) -> bool:
    """Whether a path is one of `SYSTEM_NAMES` or a similar file. Other hidden files may be listed on purpose."""
    path = PurePath(name)
    return bool({".ipynb_checkpoints", *SYSTEM_NAMES} & set(path.parts)) or path.name.startswith("._")


class ListImages(DecodedImages):
    """Images by path relative to a folder."""

    def __init__(
        self,
        root: Path,
        files: np.ndarray,
        labels: Tensor,
        identities: Sequence[str],
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        super().__init__(labels, identities, image_size, channels)
        self.root, self.files = root, files

    def source(self, index: int) -> tuple[str, Path]:
        path = self.root / os.fsdecode(self.files[index])
        return str(path), path
