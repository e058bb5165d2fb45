"""Aligns a folder of photographs by their landmarks, and writes the aligned faces to another folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import SUFFIXES

from ..data.decode import UnreadableError, read_image
from .geometry import TEMPLATES, goodness_of_fit, similarity_transform, warp
from .landmarks import Row, read_rows

CHUNK = 256  # rows submitted to the threads at a time
# Profile faces have a fit of 0.6. Landmarks in another order, or with left and right swapped, have almost none.
MIN_FIT = 0.5


@dataclass(frozen=True)
class AlignConfig:
    """Rotate, scale and crop faces so that their five landmarks match a template.

    The landmarks are left eye, right eye, nose, left and right mouth corner, as seen in the image. Coordinates x and y
    are pixels, and integers are pixel centers. They refer to the upright image, after its EXIF orientation is applied,
    as cv2.imread and Pillow's ImageOps.exif_transpose return it. Images whose output exists are skipped, so that the
    same command continues after an interruption. An existing output of another size is an error.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of the photographs."""
    landmarks: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LANDMARKS")]
    """A .csv with path,x1,y1,...,x5,y5 per line, or a .json with {path: [[x1, y1], ..., [x5, y5]]}."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder for the aligned faces, with the same relative paths."""
    size: Literal["112x112", "112x96"] = "112x112"
    """Height and width: InsightFace's template, or SphereFace's (and RegularFace's)."""
    workers: int = 4
    """Number of threads."""

    def __post_init__(self) -> None:
        if not self.images.is_dir():
            raise ValueError(f"images: no folder {str(self.images)!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.output.resolve() == self.images.resolve():
            raise ValueError("output: the aligned faces would replace the photographs; name another folder")


@dataclass
class Outcome:
    """Numbers of aligned, existing and failed faces."""

    aligned: int = 0
    present: int = 0  # already existed
    failed: int = 0


class BadRow(Exception):
    """A row cannot be used; the message is the reason."""


def align(config: AlignConfig, console: Console, errors: Console) -> Outcome:
    """Align the image of every row; problems with single rows are printed to `errors`.

    Raises:
        DataError: the landmarks cannot be read, there are none, or an existing output has another size.
        OSError: an aligned face cannot be written.
    """
    total, rows = read_rows(config.landmarks)
    outcome, seen = Outcome(), set()

    def attempt(row: Row) -> str | BadRow:
        try:
            return "aligned" if _align_image(config, row) else "present"
        except BadRow as error:
            return error

    columns = TextColumn("aligning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with ThreadPoolExecutor(config.workers) as pool, progress:
        task = progress.add_task("", total=total)
        for chunk in _chunks(rows):
            once = []
            for row in chunk:
                if row.path in seen:
                    outcome.failed += 1
                    _print_error(errors, f"{row.place}: {row.path}: it has landmarks already")
                else:
                    seen.add(row.path)
                    once.append(row)
            for row, result in zip(once, pool.map(attempt, once), strict=True):
                if result == "aligned":
                    outcome.aligned += 1
                elif result == "present":
                    outcome.present += 1
                else:
                    outcome.failed += 1
                    _print_error(errors, f"{row.place}: {row.path}: {result}")
            progress.advance(task, len(chunk))
    if not seen:
        raise DataError(f"{config.landmarks} has no landmarks")
    return outcome


def _align_image(config: AlignConfig, row: Row) -> bool:
    """Write one aligned face; False if it exists.

    Raises:
        BadRow: the row or its image cannot be used.
        DataError: the face exists in another size.
    """
    relative = PurePath(row.path)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise BadRow("the path leaves the folder")
    if relative.suffix.lower() not in SUFFIXES:
        raise BadRow(f"expected an image ending in {', '.join(SUFFIXES)}")
    target = config.output / relative
    size, template = TEMPLATES[config.size]
    if target.exists():
        _check_size(target, size)
        return False

    try:
        points = row.points()
        matrix = similarity_transform(points, template)
    except ValueError as error:
        raise BadRow(str(error)) from error
    if (fit := goodness_of_fit(points, template, matrix)) < MIN_FIT:
        raise BadRow(
            f"the points are not those of a face (fit {fit:.2f}): expected left eye, right eye, nose, left and right "
            "mouth corner, as seen in the image"
        )
    try:
        image = read_image(config.images / relative)
    except UnreadableError as error:
        raise BadRow(f"cannot be read: {error}") from error
    # Integers are pixel centers. A face at the border of an image may have some points outside.
    if not ((points > -0.5) & (points < np.array(image.size) - 0.5)).all(axis=1).any():
        width, height = image.size
        raise BadRow(f"none of the points is in the upright image, which is {width} wide and {height} high")
    _save(warp(image, matrix, size), target)
    return True


def _check_size(face: Path, size: tuple[int, int]) -> None:
    """Compare an existing output with `size` (height, width); files that are not images are ignored.

    Raises:
        DataError: it has another size.
    """
    try:
        with Image.open(face) as image:
            existing = image.height, image.width
    except Exception:  # noqa: BLE001  Pillow raises many types for damaged files
        return
    if existing != size:
        actual, expected = ("{}x{}".format(*shape) for shape in (existing, size))
        raise DataError(f"{face} is {actual}, not {expected}: name another output folder, or remove that one")


def _save(face: Image.Image, target: Path) -> None:
    """Write a temporary file and rename it to `target`, so that outputs are always complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        face.save(temporary, Image.registered_extensions()[target.suffix.lower()], quality=95)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _print_error(errors: Console, message: str) -> None:
    """Print a message about a row in red."""
    errors.print(message, style="red", highlight=False, soft_wrap=True)
