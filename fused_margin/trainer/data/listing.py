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
            suffix = PurePath(entry.name).suffix.lower()
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif entry.is_dir():
                skipped["folders inside the folder of an identity or video"] += 1
            elif suffix in SUFFIXES:
                names.append(entry.name)
            else:
                skipped[f"files ending in {suffix}" if suffix else "files without a suffix"] += 1
    return sorted(names)


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """One line: how many of each kind were skipped."""
    return "skipped: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(skipped.items()))
