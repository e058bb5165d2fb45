"""The sources of images, behind one call: `load_splits`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .base import DataError, Splits
from .benchmarks import VerificationSet, is_lfw_list, read_bin, read_lfw, read_ytf
from .digits import digit_splits
from .folder import folder_splits
from .glyphs import glyph_splits
from .lists import list_splits
from .records import INDEX, RECORDS, record_splits

__all__ = ["DataError", "Splits", "find_benchmark_reader", "find_reader", "load_splits"]

LISTS = (".txt", ".lst")
LFW_LIST, YTF_LIST = "pairs.txt", "splits.txt"


def load_splits(data: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Training and test sets of "glyphs", "digits" or what is at a path."""
    embedded = {"glyphs": glyph_splits, "digits": digit_splits}
    if data in embedded:
        return embedded[data](image_size, channels, test_fraction, seed)
    return find_reader(data)(data, image_size, channels, test_fraction, seed)


def find_benchmark_reader(path: str, *, videos: bool = False) -> Callable[[], VerificationSet] | None:
    """The reader of a published verification set, or None where there is no such set at the path.

    A set is a .bin file, a list of pairs as LFW or YouTube Faces has it, or a folder with pairs.txt or splits.txt.
    In a folder that has both, `videos` takes splits.txt.
    """
    found = Path(path)
    if found.is_file():
        if found.suffix.lower() == ".bin":
            return partial(read_bin, found)
        if found.name == YTF_LIST:
            return partial(read_ytf, found.parent, found)
        is_list = found.name == LFW_LIST or (found.suffix.lower() == ".txt" and is_lfw_list(found))
        return partial(read_lfw, found.parent, found) if is_list else None
    readers = {LFW_LIST: read_lfw, YTF_LIST: read_ytf}
    present = [name for name in readers if (found / name).is_file()]
    if not present:
        return None
    return partial(readers[present[-1] if videos else present[0]], found)


def find_reader(path: str) -> Callable[..., Splits]:
    """The reader of the images at a path.

    Raises:
        DataError: there is nothing that can be read.
    """
    found = Path(path)
    if found.is_dir():
        return record_splits if (found / RECORDS).is_file() else folder_splits
    if found.is_file() and found.suffix.lower() in LISTS:
        return list_splits
    wrong = f"{path!r} is no folder and no list" if found.exists() else f"no folder {path!r} and no such list"
    raise DataError(
        f"data: {wrong}; expected glyphs, digits, a folder of identities (FOLDER/identity/image.jpg), a folder with "
        f"{RECORDS} and {INDEX}, or a list ({' or '.join(LISTS)}) of a path and a label per line"
    )
