"""The command `fused-margin align`: a folder of photographs and their landmarks to a folder of aligned faces."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
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

from .consoles import command_consoles
from .data import DataError
from .data.align import TEMPLATES, goodness_of_fit, similarity_transform, warp
from .data.decode import SUFFIXES, UnreadableError, read_image
from .data.landmarks import Row, read_rows

PROG = "fused-margin align"
ALIGNED, BROKEN, INTERRUPTED = 0, 1, 130
CHUNK = 256  # rows that are handed out at once
# Faces seen fully from the side still explain 0.6 of the template's spread; landmarks in another order, or left
# and right exchanged, next to nothing.
LEAST_FIT = 0.5


@dataclass(frozen=True)
class AlignConfig:
    """Turn, scale and cut faces so that their five landmarks come to lie on a template.

    The landmarks are left eye, right eye, nose, left and right corner of the mouth, as seen in the
    image: x and y in pixels, whole numbers being the middles of pixels. They are counted in the upright
    image, after its EXIF orientation has been applied, as detectors get it from cv2.imread or Pillow's
    ImageOps.exif_transpose. An image whose output exists is skipped, so that the same command continues
    where it was stopped; an output of another size ends it.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of the photographs."""
    landmarks: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="LANDMARKS")]
    """A .csv with path,x1,y1,...,x5,y5 per line, or a .json with {path: [[x1, y1], ..., [x5, y5]]}."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder for the aligned faces, under the same paths."""
    size: Literal["112x112", "112x96"] = "112x112"
    """Height and width: InsightFace's template, or SphereFace's (and RegularFace's)."""
    workers: int = 4
    """Images worked on at a time."""

    def __post_init__(self) -> None:
        if not self.images.is_dir():
            raise ValueError(f"images: no folder {str(self.images)!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.output.resolve() == self.images.resolve():
            raise ValueError("output: the aligned faces would have the photographs' names; name another folder")


@dataclass
class Outcome:
    """What became of the rows."""

    aligned: int = 0
    present: int = 0  # before
    failed: int = 0


class BadRow(Exception):
    """A row that cannot be used, and why."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = tyro.cli(AlignConfig, prog=PROG, args=args)
    try:
        outcome = align(config, console, errors)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        return INTERRUPTED
    except (DataError, OSError) as error:
        _complain(errors, f"error: {error}")
        return BROKEN
    console.print(
        f"{outcome.aligned:,} aligned, {outcome.present:,} there already, {outcome.failed:,} could not be",
        highlight=False,
    )
    return ALIGNED if outcome.aligned or outcome.present else BROKEN


def align(config: AlignConfig, console: Console, errors: Console) -> Outcome:
    """Align every row's image; what is wrong with a row is printed to `errors`.

    Raises:
        DataError: the landmarks cannot be read, or there are none, or the output has a face of another size.
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
                    _complain(errors, f"{row.place}: {row.path}: it has landmarks already")
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
                    _complain(errors, f"{row.place}: {row.path}: {result}")
            progress.advance(task, len(chunk))
    if not seen:
        raise DataError(f"{config.landmarks} has no landmarks")
    return outcome


def _align_image(config: AlignConfig, row: Row) -> bool:
    """Write one aligned face; False if it is there already.

    Raises:
        BadRow: the row or its image cannot be used.
        DataError: the face is there in another size.
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
    if (fit := goodness_of_fit(points, template, matrix)) < LEAST_FIT:
        raise BadRow(
            f"the points are not those of a face (fit {fit:.2f}): expected left eye, right eye, nose, left and right "
            "corner of the mouth, as seen"
        )
    try:
        image = read_image(config.images / relative)
    except UnreadableError as error:
        raise BadRow(f"cannot be read: {error}") from error
    # Whole numbers are the middles of pixels. A face that is cut off at a side has points outside.
    if not ((points > -0.5) & (points < np.array(image.size) - 0.5)).all(axis=1).any():
        width, height = image.size
        raise BadRow(f"none of the points is in the upright picture, which is {width} wide and {height} high")
    _save(warp(image, matrix, size), target)
    return True


def _check_size(face: Path, size: tuple[int, int]) -> None:
    """Compare an existing output with `size` (height, width); a file that is no image is left as it is.

    Raises:
        DataError: it is an image of another size.
    """
    try:
        with Image.open(face) as image:
            found = image.height, image.width
    except Exception:  # noqa: BLE001  its bytes may be anything, which makes Pillow fail in any way
        return
    if found != size:
        raise DataError(
            f"{face} is {found[0]}x{found[1]}, not {size[0]}x{size[1]}: name another output folder, or remove that one"
        )


def _save(face: Image.Image, target: Path) -> None:
    """Write the image beside `target`, then move it there: what is there is whole."""
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


def _complain(errors: Console, message: str) -> None:
    errors.print(message, style="red", highlight=False, soft_wrap=True)
