"""Reads landmark files: CSV rows `path, x1, y1, ..., x5, y5`, or a JSON object from paths to points.

The columns of a CSV may be in another order, among others, if the first line names them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import text_lines

POINT_COLUMNS = tuple(f"{axis}{number}" for number in range(1, 6) for axis in "xy")
COLUMNS = ("path", *POINT_COLUMNS)


class Row(NamedTuple):
    """The unparsed entry of one image."""

    place: str  # position in the file, for messages
    path: str
    values: Any

    def points(self) -> np.ndarray:
        """The five points (5, 2).

        Raises:
            ValueError: the entry does not have ten finite numbers.
        """
        try:
            points = np.asarray(self.values, dtype=np.float64)
        except (TypeError, ValueError):
            points = np.empty(0)
        if points.shape not in ((10,), (5, 2)) or not np.isfinite(points).all():
            if isinstance(self.values, list) and self.values and not any(self.values):
                raise ValueError("it has no landmarks")
            shown = ", ".join(map(str, self.values)) if isinstance(self.values, list) else repr(self.values)
            raise ValueError(f"expected ten numbers, x and y of five points, got {shown[:100]}")
        return points.reshape(5, 2)


def read_rows(path: Path) -> tuple[int, Iterator[Row]]:
    """Number of lines or entries of a .csv or .json file, and its rows.

    Raises:
        DataError: the file has another suffix or cannot be parsed.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        with open(path, "rb") as lines:
            return sum(1 for _ in lines), _csv_rows(path)
    if suffix != ".json":
        raise DataError(f"{path}: expected landmarks in a .csv or .json file, or a --detector that finds them")
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(entries, dict):
        raise DataError(f"{path}: expected one object of image paths and their landmarks")
    return len(entries), (Row(str(path), name, values) for name, values in entries.items())


def _csv_rows(path: Path) -> Iterator[Row]:
    lines = csv.reader(text_lines(path, newline=""))
    columns = None  # places of path and points in a line, if the first one names them
    try:
        for fields in lines:
            if lines.line_num == 1 and set(COLUMNS) <= set(fields):
                columns = [fields.index(name) for name in COLUMNS]
            elif fields and not (lines.line_num == 1 and _names_columns(fields)):
                if columns is not None:
                    fields = [fields[column] if column < len(fields) else "" for column in columns]
                yield Row(f"{path}, line {lines.line_num}", fields[0], fields[1:])
    except csv.Error as error:
        raise DataError(f"{path}, line {lines.line_num}: {error}") from error


def _names_columns(fields: list[str]) -> bool:
    """Whether a first line is a heading, with a name and no number in each column."""
    return len(fields) > 1 and all(field.strip() and not _is_number(field) for field in fields[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
