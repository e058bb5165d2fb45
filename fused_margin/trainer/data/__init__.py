"""Sources of training images, behind one function: `load_splits`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fused_margin.evaluation.errors import DataError

from .base import Splits
from .digits import digit_splits
from .folder import folder_splits
from .glyphs import glyph_splits
from .lists import list_splits
from .records import INDEX, RECORDS, record_splits

__all__ = ["EMBEDDED", "DataError", "Splits", "find_reader", "load_splits"]

EMBEDDED = {"glyphs": glyph_splits, "digits": digit_splits}  # need no download
LISTS = (".txt", ".lst")


def load_splits(data: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Training and test sets of "glyphs", of "digits", or of the images at a path."""
    if data in EMBEDDED:
        return EMBEDDED[data](image_size, channels, test_fraction, seed)
    return find_reader(data)(data, image_size, channels, test_fraction, seed)


def find_reader(path: str, option: str = "data") -> Callable[..., Splits]:
    """The reader of the images at a path, which is the value of an option.

    Raises:
        DataError: there is nothing readable at the path.
    """
    location = Path(path)
    if location.is_dir():
        return record_splits if (location / RECORDS).is_file() else folder_splits
    if location.is_file() and location.suffix.lower() in LISTS:
        return list_splits
    wrong = f"{path!r} is no folder and no list" if location.exists() else f"no folder {path!r} and no such list"
    raise DataError(
        f"{option}: {wrong}; expected glyphs, digits, a folder of identities (FOLDER/identity/image.jpg), a folder with "
        f"{RECORDS} and {INDEX}, or a list ({' or '.join(LISTS)}) of a path and a label per line"
    )
