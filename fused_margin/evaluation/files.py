"""Reads folders of images and text lists, and counts skipped files by kind."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from .errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # byte order marks, read as UTF-8 with surrogateescape
# Files and folders that macOS, network drives, Windows and Python create by themselves.
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
MAX_LISTED = 10  # missing files that an error lists


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder begins with a dot or is one of `SYSTEM_NAMES`."""
    return name.startswith(".") or name in SYSTEM_NAMES


def image_names(folder: str | Path, skipped: Counter[str]) -> list[str]:
    """Sorted names of the images in a folder; other entries are counted in `skipped` by kind."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif entry.is_dir():
                skipped["folders inside the folder of an identity or video"] += 1
            elif is_image(entry.name):
                names.append(entry.name)
            else:
                skipped[skip_reason(entry.name)] += 1
    return sorted(names)


def find_images(root: Path, skipped: Counter[str]) -> list[str]:
    """Sorted relative paths of the images in a folder and its subfolders; other entries are counted in `skipped`."""
    paths, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above would never end
            folders.clear()
            continue
        seen.add(real)
        for name in (*folders, *files):
            if is_hidden(name):
                skipped[HIDDEN] += 1
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in files:
            if is_image(name) and not is_hidden(name):
                paths.append((Path(folder) / name).relative_to(root).as_posix())
            elif not is_hidden(name):
                skipped[skip_reason(name)] += 1
    return sorted(paths)


def is_image(name: str) -> bool:
    """Whether the suffix is that of an image."""
    return PurePath(name).suffix.lower() in SUFFIXES


def skip_reason(name: str) -> str:
    """The kind of a file that is skipped for its suffix."""
    suffix = PurePath(name).suffix.lower()
    return f"files ending in {suffix}" if suffix else "files without a suffix"


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """One line with the number of skipped files, folders or lines of each kind."""
    return "skipped: " + ", ".join(f"{kind} ({count:,})" for kind, count in sorted(skipped.items()))


def check_found(missing: Sequence[str], total: int, kind: str, source: str, root: Path) -> None:
    """Raise DataError if there are `missing` ones among the `total` files of a `kind` that `source` lists."""
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise DataError(
            f"{len(missing)} of the {total} {kind} listed in {source} have no file in {root}: "
            f"{', '.join(missing[:MAX_LISTED])}{more}"
        )


def text_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Lines of a UTF-8 text file. Other bytes are kept, because file names may have any encoding.

    Args:
        newline: as for `open`.

    Raises:
        DataError: the file is UTF-16, as some programs on Windows write it, or not a text file.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as lines:
        for line in lines:
            if "\0" in line or line.startswith(UTF16_MARKS):
                raise DataError(f"{path} is not UTF-8 text: it may be UTF-16; save it as UTF-8")
            yield line


def read_fields(path: Path, separator: str | None = None) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not blank.

    Args:
        separator: of the fields; the default is tabs in a line that has any, otherwise spaces.

    Raises:
        DataError: as `text_lines`.
    """
    for number, line in enumerate(text_lines(path), 1):
        if line := line.strip():
            yield number, [field.strip() for field in line.split(separator or ("\t" if "\t" in line else None))]
