"""The images of a folder, and a count of what is skipped: hidden and system files, and files of other kinds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath

from .decode import SUFFIXES

# What unzipping on a Mac, network drives, Windows and Python leave in a folder.
SYSTEM_NAMES = {
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "__pycache__",
    "Thumbs.db",
    "desktop.ini",
}
HIDDEN = "hidden or system files and folders"


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no user's: it begins with a dot, or a system made it."""
    return name.startswith(".") or name in SYSTEM_NAMES


def image_names(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """Names of the images in a folder, in order; all else is counted in `skipped` by its kind."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif entry.is_dir():
                skipped["folders inside the folder of an identity or video"] += 1
            elif (kind := kind_if_no_image(entry.name)) is None:
                names.append(entry.name)
            else:
                skipped[kind] += 1
    return sorted(names)


def kind_if_no_image(name: str) -> str | None:
    """What a file that is skipped for its suffix is counted as; None for an image."""
    suffix = PurePath(name).suffix.lower()
    if suffix in SUFFIXES:
        return None
    return f"files ending in {suffix}" if suffix else "files without a suffix"


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """One line: how many of each kind were skipped."""
    return "skipped: " + ", ".join(f"{kind} ({count:,})" for kind, count in sorted(skipped.items()))
