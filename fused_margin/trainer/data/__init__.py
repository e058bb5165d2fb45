"""The sources of images, behind one call: `load_splits`."""

from __future__ import annotations

from .base import DataError, Splits
from .digits import digit_splits
from .folder import folder_splits
from .glyphs import glyph_splits

__all__ = ["DataError", "Splits", "load_splits"]


def load_splits(data: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Training and test sets of "glyphs", "digits" or a folder of identities."""
    sources = {"glyphs": glyph_splits, "digits": digit_splits}
    if data in sources:
        return sources[data](image_size, channels, test_fraction, seed)
    return folder_splits(data, image_size, channels, test_fraction, seed)
