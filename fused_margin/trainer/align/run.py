"""Aligns the photographs that a file of landmarks names, and writes the aligned faces to another folder."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePath

from rich.console import Console

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import SUFFIXES

from ..data.decode import UnreadableError, read_image
from .config import AlignConfig
from .faces import AlignmentError, Outcome, crop_face, exists, face_transform, print_error, progress_bar, save_face
from .geometry import TEMPLATES
from .landmarks import Row, read_rows

CHUNK = 256  # rows submitted to the threads at a time


def align(config: AlignConfig, console: Console, errors: Console) -> Outcome:
    """Align the image of every row; problems with single rows are printed to `errors`.

    Raises:
        DataError: the landmarks cannot be read, there are none, or an existing output has another size.
        OSError: an aligned face cannot be written.
    """
    total, rows = read_rows(config.landmark_file)
    outcome, seen = Outcome(), set()

    def attempt(row: Row) -> str | AlignmentError:
        try:
            return "aligned" if _align_image(config, row) else "present"
        except AlignmentError as error:
            return error

    with ThreadPoolExecutor(config.workers) as pool, progress_bar(console) as progress:
        task = progress.add_task("", total=total)
        for chunk in _chunks(rows):
            once = []
            for row in chunk:
                if row.path in seen:
                    outcome.failed += 1
                    print_error(errors, f"{row.place}: {row.path}: it has landmarks already")
                else:
                    seen.add(row.path)
                    once.append(row)
            for row, result in zip(once, pool.map(attempt, once), strict=True):
                outcome.add(result)
                if isinstance(result, AlignmentError):
                    print_error(errors, f"{row.place}: {row.path}: {result}")
            progress.advance(task, len(chunk))
    if not seen:
        raise DataError(f"{config.landmark_file} has no landmarks")
    return outcome


def _align_image(config: AlignConfig, row: Row) -> bool:
    """Write one aligned face; False if it exists.

    Raises:
        AlignmentError: the row or its image cannot be used.
        DataError: the face exists in another size.
    """
    relative = PurePath(row.path)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise AlignmentError("the path leaves the folder")
    if relative.suffix.lower() not in SUFFIXES:
        raise AlignmentError(f"expected an image ending in {', '.join(SUFFIXES)}")
    target, template = config.output_folder / relative, TEMPLATES[config.size]
    if exists(target, template.size):
        return False
    try:
        points = row.points()
    except ValueError as error:
        raise AlignmentError(str(error)) from error
    matrix = face_transform(points, template)
    try:
        image = read_image(config.images / relative)
    except UnreadableError as error:
        raise AlignmentError(f"cannot be read: {error}") from error
    save_face(crop_face(image, points, matrix, template.size), target)
    return True


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk
