"""Aligns one face by its landmarks and writes it; used with landmarks from a file and from a detector."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fused_margin.evaluation.errors import DataError

from .geometry import Template, goodness_of_fit, similarity_transform, warp

# Profile faces have a fit of 0.6. Landmarks in another order, or with left and right swapped, have almost none.
MIN_FIT = 0.5


class AlignmentError(Exception):
    """A face cannot be aligned; the message is the reason."""


@dataclass
class Outcome:
    """Numbers of aligned, existing and failed faces."""

    aligned: int = 0
    present: int = 0  # already existed
    failed: int = 0
    notes: list[str] = field(default_factory=list)  # further lines to print

    def add(self, result: str | AlignmentError) -> None:
        """Count a result: "aligned", "present" or the reason of a failure."""
        if result == "aligned":
            self.aligned += 1
        elif result == "present":
            self.present += 1
        else:
            self.failed += 1


def face_transform(points: np.ndarray, template: Template) -> np.ndarray:
    """Matrix (2, 3) from points (5, 2) to a template.

    Raises:
        AlignmentError: the points are not those of a face.
    """
    try:
        matrix = similarity_transform(points, template.points)
    except ValueError as error:
        raise AlignmentError(str(error)) from error
    if (fit := goodness_of_fit(points, template.points, matrix)) < MIN_FIT:
        raise AlignmentError(
            f"the points are not those of a face (fit {fit:.2f}): expected left eye, right eye, nose, left and right "
            "mouth corner, as seen in the image"
        )
    return matrix


def inside(points: np.ndarray, image: Image.Image) -> np.ndarray:
    """Which of the points (n, 2) are in an image. Integers are pixel centers."""
    return np.all((points > -0.5) & (points < np.array(image.size) - 0.5), axis=1)


def crop_face(image: Image.Image, points: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The face with the landmarks `points` (5, 2), transformed by `face_transform`'s matrix.

    Raises:
        AlignmentError: the points are outside the image.
    """
    # A face at the border of an image may have some points outside.
    if not inside(points, image).any():
        width, height = image.size
        raise AlignmentError(f"none of the points is in the upright image, which is {width} wide and {height} high")
    return warp(image, matrix, size)


def save_face(face: Image.Image, target: Path) -> None:
    """Write a temporary file and rename it to `target`, so that outputs are always complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        face.save(temporary, Image.registered_extensions()[target.suffix.lower()], quality=95)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def exists(face: Path, size: tuple[int, int]) -> bool:
    """Whether the output exists. Its size is compared with `size` (height, width), if it is an image.

    Raises:
        DataError: it has another size.
    """
    if not face.exists():
        return False
    try:
        with Image.open(face) as image:
            existing = image.height, image.width
    except Exception:  # noqa: BLE001  Pillow raises many types for damaged files
        return True
    if existing != size:
        actual, expected = ("{}x{}".format(*shape) for shape in (existing, size))
        raise DataError(f"{face} is {actual}, not {expected}: name another output folder, or remove that one")
    return True


def progress_bar(console: Console) -> Progress:
    """The progress of the alignment, which disappears at the end."""
    columns = TextColumn("aligning"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def print_error(errors: Console, message: str) -> None:
    """Print a message about an image in red."""
    errors.print(message, style="red", highlight=False, soft_wrap=True)
