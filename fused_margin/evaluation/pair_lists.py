"""Readers of published verification sets: LFW and YouTube Faces with their lists, InsightFace's .bin files."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .files import SUFFIXES, check_found, image_names, read_fields
from .folds import stratified_folds, unshuffled_folds
from .safe_pickle import load_plain

LFW_LIST, YTF_LIST = "pairs.txt", "splits.txt"
# Image folders of the published archives, next to the lists.
LFW_FOLDERS = ("lfw", "lfw_funneled", "lfw-deepfunneled")
YTF_FOLDER = "aligned_images_DB"
FOLDS = 10  # if a list has none


@dataclass(frozen=True)
class VerificationSet:
    """Pairs of items: the result of a reader. An item is one image, or the frames of one video.

    Attributes:
        source: the file that lists the pairs.
        pairs: (num_pairs, 2) item indices.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) fold indices.
        images: paths, or encoded images.
        item: (num_images,) item index of each image.
        of_videos: whether items are videos. If not, item i is image i.
        has_folds: whether the list defines the folds. If not, the reader chose ``fold``.
        skipped: number of skipped files by kind.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import VerificationSet
        >>> pairs, same, fold = np.array([[0, 1], [0, 2]]), np.array([True, False]), np.array([0, 1])
        >>> images = ["Ann_1.jpg", "Ann_2.jpg", "Bob_1.jpg"]
        >>> data = VerificationSet("pairs.txt", pairs, same, fold, images, item=np.arange(3))
        >>> [data.images[i] for i in data.pairs[0]]
        ['Ann_1.jpg', 'Ann_2.jpg']
    """

    source: str
    pairs: np.ndarray
    same: np.ndarray
    fold: np.ndarray
    images: Sequence[str | bytes]
    item: np.ndarray
    of_videos: bool = False
    has_folds: bool = True
    skipped: Mapping[str, int] = field(default_factory=dict)


def find_pair_list(path: str, *, videos: bool = False) -> Callable[[], VerificationSet] | None:
    """The reader of the published verification set at a path; None if there is no such set.

    A set is a .bin file, a list of pairs in LFW's or YouTube Faces' format, or a folder with pairs.txt or splits.txt.

    Args:
        path: the file or folder.
        videos: whether to choose splits.txt in a folder with both lists.

    Returns:
        A function without arguments that reads the set.

    Examples:
        >>> from fused_margin.evaluation import find_pair_list
        >>> find_pair_list("a-folder-without-a-list") is None
        True
    """
    location = Path(path)
    if location.is_file():
        if location.suffix.lower() == ".bin":
            return partial(read_bin, location)
        if location.name == YTF_LIST:
            return partial(read_ytf, location.parent, location)
        is_list = location.name == LFW_LIST or (location.suffix.lower() == ".txt" and is_lfw_list(location))
        return partial(read_lfw, location.parent, location) if is_list else None
    readers = {LFW_LIST: read_lfw, YTF_LIST: read_ytf}
    present = [name for name in readers if (location / name).is_file()]
    if not present:
        return None
    return partial(readers[present[-1] if videos else present[0]], location)


def read_lfw(root: Path, pairs: Path | None = None) -> VerificationSet:
    r"""Read Labeled Faces in the Wild: a folder of images and a list of pairs.

    An image is root/Some_Name/Some_Name_0001.jpg. The folders of names may also be in root/lfw, root/lfw_funneled or
    root/lfw-deepfunneled, if only one of these exists. Images may end in .jpg, .jpeg, .png, .bmp, .webp, .pgm, .ppm,
    .tif or .tiff.

    The first line of the list has the number of folds and the number of genuine (and of impostor) pairs per fold. Other
    lines are ``name number number`` for a genuine pair and ``name number name number`` for an impostor pair. If the
    first line has the number of pairs only, as in pairsDevTest.txt, genuine and impostor pairs are each divided by
    their order into ten folds, or fewer if there are fewer pairs.

    Args:
        root: folder of the images.
        pairs: the list; root/pairs.txt by default.

    Raises:
        DataError: a line has another format, lines or images are missing, several image folders exist, or the first
            line says one pair of each kind.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fused_margin.evaluation import read_lfw
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder)
        ...     for name in ("Ann/Ann_0001.jpg", "Ann/Ann_0002.jpg", "Bob/Bob_0001.jpg"):
        ...         (root / name).parent.mkdir(exist_ok=True)
        ...         (root / name).touch()
        ...     _ = (root / "pairs.txt").write_text("1 1\nAnn 1 2\nAnn 1 Bob 1\n")
        ...     data = read_lfw(root)
        >>> data.pairs.tolist(), data.same.tolist()
        ([[0, 1], [0, 2]], [True, False])
    """
    pairs = pairs or root / LFW_LIST
    lines = read_fields(pairs)
    number, header = next(lines, (1, []))
    if len(header) not in (1, 2) or not all(field.isdecimal() and int(field) for field in header):
        raise DataError(f"{pairs}, line {number}: expected the numbers of folds and pairs, got {' '.join(header)!r}")
    folds, pairs_per_kind = (1, *map(int, header))[-2:]

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
    if (sum(same), len(same)) != (folds * pairs_per_kind, 2 * folds * pairs_per_kind):
        raise DataError(
            f"{pairs} has {sum(same)} pairs of one identity and {len(same) - sum(same)} of two; "
            f"its first line says {folds * pairs_per_kind} of each"
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
        fold = [row // (2 * pairs_per_kind) for row in range(len(same))]
    elif pairs_per_kind > 1:
        fold = stratified_folds(np.array(same), min(FOLDS, pairs_per_kind)).tolist()
    else:
        raise DataError(f"{pairs}: its first line says one pair of each kind, which cannot be divided into folds")
    verification_set = _with_files(pairs, root, listed, same, fold, image)
    return dataclasses.replace(verification_set, has_folds=len(header) == 2)


def is_lfw_list(path: Path) -> bool:
    """Whether the first two lines of a file have the format of LFW's lists: numbers, then a pair."""
    lines = read_fields(path)
    try:
        header, pair = (next(lines, (0, []))[1] for _ in range(2))
    except DataError:
        return False
    if len(header) not in (1, 2) or len(pair) not in (3, 4):
        return False
    numbers = pair[1:] if len(pair) == 3 else pair[1::2]
    return all(field.isdecimal() for field in (*header, *numbers))


def read_ytf(root: Path, splits: Path | None = None) -> VerificationSet:
    r"""Read YouTube Faces: folders of frames and a list of pairs of videos.

    The frames of a video are in root/Some_Name/0/ or root/aligned_images_DB/Some_Name/0/. After a heading, each line of
    the list is ``split number, pair number, first name, second name, is same``. A name is Some_Name/0. The pair number
    is optional.

    Args:
        root: folder of the frames.
        splits: the list; root/splits.txt by default.

    Raises:
        DataError: a line has another format, or a video has no frames.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fused_margin.evaluation import read_ytf
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder)
        ...     for name in ("Ann/0/1.jpg", "Ann/0/2.jpg", "Ann/1/1.jpg"):
        ...         (root / name).parent.mkdir(parents=True, exist_ok=True)
        ...         (root / name).touch()
        ...     _ = (root / "splits.txt").write_text("split, pair, first, second, same\n1, 1, Ann/0, Ann/1, 1\n")
        ...     data = read_ytf(root)
        >>> data.pairs.tolist(), data.item.tolist()  # the first video has two frames
        ([[0, 1]], [0, 0, 1])
    """
    splits = splits or root / YTF_LIST
    listed, same, fold = [], [], []
    for row, (number, fields) in enumerate(read_fields(splits, ",")):
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

    verification_set = _with_files(splits, root, listed, same, fold, frames)
    return dataclasses.replace(verification_set, of_videos=True, skipped=skipped)


def read_bin(path: Path) -> VerificationSet:
    """Read InsightFace's lfw.bin, cfp_fp.bin, agedb_30.bin and others.

    The file is a pickle of (images, flags), with the two encoded images of each pair in sequence. It is read without
    executing code. The pairs are divided into ten folds of consecutive pairs.

    Args:
        path: the file.

    Raises:
        DataError: the file has other contents.

    Examples:
        >>> import pickle, tempfile
        >>> from pathlib import Path
        >>> from fused_margin.evaluation import read_bin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pairs.bin"
        ...     _ = path.write_bytes(pickle.dumps(([b"an encoded image"] * 40, [True, False] * 10)))
        ...     data = read_bin(path)
        >>> data.pairs.shape, int(data.fold.max())
        ((20, 2), 9)
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
    """Bytes of an image. A Python 2 pickle that was loaded as Latin-1 and saved again has text instead."""
    if isinstance(image, str):
        return image.encode("latin1", "replace")
    return bytes(image) if isinstance(image, bytearray) else image


def _with_files(
    source: Path,
    root: Path,
    listed: list[tuple[str, str]],
    same: list[bool],
    fold: list[int],
    files_of: Callable[[str], list[str]],
) -> VerificationSet:
    """Index the items of the pairs, and find their files."""
    numbers: dict[str, int] = {}
    pairs = [[numbers.setdefault(name, len(numbers)) for name in names] for names in listed]
    files_of_items = [files_of(name) for name in numbers]
    missing = [name for name, files in zip(numbers, files_of_items, strict=True) if not files]
    check_found(missing, len(numbers), "images or videos", str(source), root)
    images = [file for files in files_of_items for file in files]
    item = np.repeat(np.arange(len(numbers)), [len(files) for files in files_of_items])
    return VerificationSet(str(source), np.array(pairs), np.array(same), np.array(fold), images, item)
