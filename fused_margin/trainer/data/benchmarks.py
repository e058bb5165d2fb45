"""Verification sets as they are published: LFW with pairs.txt, YouTube Faces, InsightFace's .bin files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..folds import folds_of_each_kind, unshuffled_folds
from .base import DataError
from .decode import SUFFIXES, DecodedImages
from .listing import image_names
from .safe_pickle import load_plain

NAMED = 10  # missing files that an error lists
# Folders of images that the publications have beside their lists.
LFW_FOLDERS = ("lfw", "lfw_funneled", "lfw-deepfunneled")
YTF_FOLDER = "aligned_images_DB"
FOLDS = 10  # where a list gives none


@dataclass(frozen=True)
class VerificationSet:
    """Pairs of items, an item being one image or the frames of one video."""

    source: str  # the file that lists the pairs
    pairs: np.ndarray  # (num_pairs, 2) items
    same: np.ndarray  # (num_pairs,) bool: both items show one identity
    fold: np.ndarray  # (num_pairs,) from 0
    images: list[str] | list[bytes]  # files, or encoded images
    item: np.ndarray  # (num_images,) item that an image belongs to
    of_videos: bool = False  # an item is a video; if not, item i is image i
    has_folds: bool = True  # the publication gives the folds; if not, `fold` is a choice
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of files of each kind

    def image_set(self, image_size: tuple[int, int], channels: int) -> BenchmarkImages:
        """The images to be read by batch."""
        return BenchmarkImages(self, image_size, channels)


class BenchmarkImages(DecodedImages):
    """All images of a verification set; an image's label is its row, which tells the readable ones apart."""

    def __init__(self, benchmark: VerificationSet, image_size: tuple[int, int], channels: int) -> None:
        names = [
            f"{benchmark.source}, image {row}" if isinstance(image, bytes) else image
            for row, image in enumerate(benchmark.images)
        ]
        super().__init__(torch.arange(len(names)), names, image_size, channels)
        self.images = benchmark.images

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        image = self.images[index]
        return self.identities[index], BytesIO(image) if isinstance(image, bytes) else Path(image)


def read_lfw(root: Path, pairs: Path | None = None) -> VerificationSet:
    """Labeled Faces in the Wild: root/Some_Name/Some_Name_0001.jpg, and pairs.txt, by default in root.

    The folders of names may also be in root/lfw, root/lfw_funneled or root/lfw-deepfunneled, if only
    one of these exists.

    The first line of pairs.txt has the number of folds and that of pairs of either kind in a fold,
    or the latter alone; a pair is `name number number` or `name number name number`. Images may end
    in any of `decode.SUFFIXES`. With the number of pairs alone, as in pairsDevTest.txt, the pairs of
    each kind are divided by their order, into ten folds or as many as there are pairs of a kind.

    Raises:
        DataError: a line is not of the format, lines or images are missing, there are several folders
            to take the images from, or there is a single pair of either kind.
    """
    pairs = pairs or root / "pairs.txt"
    lines = _read_lines(pairs)
    number, header = next(lines, (1, []))
    if len(header) not in (1, 2) or not all(field.isdecimal() and int(field) for field in header):
        raise DataError(f"{pairs}, line {number}: expected the numbers of folds and pairs, got {' '.join(header)!r}")
    folds, of_a_kind = (1, *map(int, header))[-2:]

    listed, same = [], []
    for number, fields in lines:
        is_same = len(fields) == 3
        name, first, other, second = [*fields[:2], fields[0], fields[2]] if is_same else (fields + [""] * 4)[:4]
        if len(fields) > 4 or not (first.isdecimal() and second.isdecimal()):
            raise DataError(
                f"{pairs}, line {number}: expected `name number number` or `name number name number`, "
                f"got {' '.join(fields)!r}"
            )
        listed.append((f"{name}/{name}_{int(first):04d}", f"{other}/{other}_{int(second):04d}"))
        same.append(is_same)
    if (sum(same), len(same)) != (folds * of_a_kind, 2 * folds * of_a_kind):
        raise DataError(
            f"{pairs} has {sum(same)} pairs of one identity and {len(same) - sum(same)} of two; "
            f"its first line says {folds * of_a_kind} of either kind"
        )

    if not any((root / name).parent.is_dir() for names in listed for name in names):
        folders = [folder for folder in LFW_FOLDERS if (root / folder).is_dir()]
        if len(folders) > 1:
            raise DataError(f"{root} has {' and '.join(folders)}: move {pairs.name} into the one to be evaluated")
        root = root.joinpath(*folders)

    def image(name: str) -> list[str]:
        files = (f"{root / name}{suffix}" for suffix in SUFFIXES)
        return [file for file in files if Path(file).is_file()][:1]

    if len(header) == 2:
        fold = [row // (2 * of_a_kind) for row in range(len(same))]
    elif of_a_kind > 1:
        fold = folds_of_each_kind(np.array(same), min(FOLDS, of_a_kind)).tolist()
    else:
        raise DataError(f"{pairs}: its first line says one pair of either kind, which cannot be divided into folds")
    found = _with_files(pairs, root, listed, same, fold, image)
    return dataclasses.replace(found, has_folds=len(header) == 2)


def is_lfw_list(path: Path) -> bool:
    """Whether a file begins as LFW's lists of pairs do, whatever its name: numbers alone, then a pair."""
    lines = _read_lines(path)
    header, pair = (next(lines, (0, []))[1] for _ in range(2))
    if len(header) not in (1, 2) or len(pair) not in (3, 4):
        return False
    numbers = pair[1:] if len(pair) == 3 else pair[1::2]
    return all(field.isdecimal() for field in (*header, *numbers))


def read_ytf(root: Path, splits: Path | None = None) -> VerificationSet:
    """YouTube Faces: frames in root/Some_Name/0/, and splits.txt, by default in root.

    After its heading splits.txt has `split number, pair number, first name, second name, is same` in
    each line, where a name is Some_Name/0; the pair number may be left out. An item is a video. Its
    frames may also be in root/aligned_images_DB/Some_Name/0/, where the publication has them.

    Raises:
        DataError: a line is not of the format, or videos have no frames.
    """
    splits = splits or root / "splits.txt"
    listed, same, fold = [], [], []
    for row, (number, fields) in enumerate(_read_lines(splits, ",")):
        if row == 0 and not fields[0].isdecimal():
            continue  # the heading
        *numbers, first, second, is_same = fields if len(fields) in (4, 5) else [""] * 4
        if not all(field.isdecimal() for field in numbers) or is_same not in ("0", "1"):
            raise DataError(
                f"{splits}, line {number}: expected `split number, pair number, first name, second name, is same`, "
                f"got {', '.join(fields)!r}"
            )
        listed.append((first, second))
        same.append(is_same == "1")
        fold.append(int(numbers[0]) - 1)
    if not listed:
        raise DataError(f"{splits} lists no pairs")

    skipped: Counter[str] = Counter()

    def frames(video: str) -> list[str]:
        folder = next((folder for folder in (root / video, root / YTF_FOLDER / video) if folder.is_dir()), None)
        return [str(folder / name) for name in image_names(folder, skipped)] if folder else []

    found = _with_files(splits, root, listed, same, fold, frames)
    return dataclasses.replace(found, of_videos=True, skipped=skipped)


def read_bin(path: Path) -> VerificationSet:
    """InsightFace's lfw.bin, cfp_fp.bin, agedb_30.bin ...: ten unshuffled folds of encoded images.

    The file is a pickle of (images, flags), the images of a pair one after the other. It is read
    without running what it names.

    Raises:
        DataError: it holds anything else.
    """
    content = load_plain(path)
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[0], list):
        raise DataError(f"{path}: expected a pickle of a list of images and one of flags")
    images = [_encoded(image) for image in content[0]]
    flags = list(content[1]) if isinstance(content[1], list | bytes) else []
    if len(images) != 2 * len(flags):
        raise DataError(f"{path} has {len(images)} images and {len(flags)} flags: expected two images per flag")
    if not all(isinstance(image, bytes) for image in images) or not all(flag in (0, 1) for flag in flags):
        raise DataError(f"{path}: expected encoded images, and flags that are true or false")
    try:
        fold = unshuffled_folds(len(flags), FOLDS)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    rows = np.arange(len(images))
    return VerificationSet(str(path), rows.reshape(-1, 2), np.array(flags, bool), fold, images, rows)


def _encoded(image: Any) -> Any:
    """Bytes of an image; a Python 2 pickle that has been read as Latin-1 and written again has text."""
    if isinstance(image, str):
        return image.encode("latin1", "replace")
    return bytes(image) if isinstance(image, bytearray) else image


def _read_lines(path: Path, separator: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Number and fields of the lines that are not empty; without a separator tabs, or else spaces."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line := line.strip():
                yield number, [field.strip() for field in line.split(separator or ("\t" if "\t" in line else None))]


def _with_files(
    source: Path,
    root: Path,
    listed: list[tuple[str, str]],
    same: list[bool],
    fold: list[int],
    files_of: Callable[[str], list[str]],
) -> VerificationSet:
    """Number the items that the pairs name, and find their files."""
    numbers: dict[str, int] = {}
    pairs = [[numbers.setdefault(name, len(numbers)) for name in names] for names in listed]
    found = [files_of(name) for name in numbers]
    if missing := [name for name, files in zip(numbers, found, strict=True) if not files]:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise DataError(
            f"{len(missing)} of the {len(found)} that {source} names have no image in {root}: "
            f"{', '.join(missing[:NAMED])}{more}"
        )
    images = [file for files in found for file in files]
    item = np.repeat(np.arange(len(found)), [len(files) for files in found])
    return VerificationSet(str(source), np.array(pairs), np.array(same), np.array(fold), images, item)
