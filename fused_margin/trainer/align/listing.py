"""The list of photographs that a detector has seen: one row each, in a CSV file that is also a file of landmarks."""

from __future__ import annotations

import csv
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import text_lines

from .detectors import Face
from .landmarks import POINT_COLUMNS

FILE_NAME = "landmarks.csv"
BOX_COLUMNS = ("left", "top", "right", "bottom")
# status: aligned, existed, no face, tiny, unreadable or failed. reason: why the last two.
# faces: number found, with the tiny ones. tiny: number below the smallest size. The others are of the selected face.
# border: 1 if the box or a landmark is outside the photograph.
COLUMNS = ("path", "status", "faces", "tiny", "border", "score", *BOX_COLUMNS, *POINT_COLUMNS, "reason")
SUMMARY = {
    "several faces": lambda row: int(row["faces"]) - int(row["tiny"]) > 1,
    "face at the border": lambda row: row["border"] == "1",
    "no face": lambda row: row["status"] == "no face",
    "tiny faces only": lambda row: row["status"] == "tiny",
    "unreadable": lambda row: row["status"] == "unreadable",
    "failed otherwise": lambda row: row["status"] == "failed",
}


class PhotographList:
    """The rows of a list, which are on disk before the faces, so that every aligned face has a row.

    Rows of photographs of earlier runs stay. In a file that a killed process left, a photograph may have two rows, of
    which the later one holds.

    Raises:
        DataError: the file exists and is not such a list.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, str]] = _read(path) if path.exists() else {}
        self._lock = threading.Lock()
        self._file: IO[str]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let `add` write rows. At the end, and after an error, the file has one row for each photograph, by path."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._save()  # without a row that was cut off, and without replaced ones
        try:
            with _open(self.path, "a") as self._file:
                yield
        finally:
            self._save()

    def add(self, path: str, status: str, values: Mapping[str, object] | None = None, face: Face | None = None) -> None:
        """Write the row of a photograph. Threads may call it."""
        row = dict.fromkeys(COLUMNS, "") | dict.fromkeys(("faces", "tiny", "border"), "0")
        row |= {"path": path, "status": status} | {name: str(value) for name, value in (values or {}).items()}
        if face is not None:
            row["score"] = f"{face.score:.6g}"
            for names, numbers in ((BOX_COLUMNS, face.box), (POINT_COLUMNS, face.landmarks.ravel())):
                row |= {name: f"{number:.2f}" for name, number in zip(names, numbers, strict=True)}
        with self._lock:
            self.rows[path] = row
            csv.DictWriter(self._file, COLUMNS).writerow(row)
            self._file.flush()

    def summary(self, paths: list[str]) -> str:
        """The numbers of photographs of `paths` of each kind, without those that there are none of."""
        rows = [self.rows[path] for path in paths if path in self.rows]
        counts = {kind: sum(map(belongs, rows)) for kind, belongs in SUMMARY.items()}
        return ", ".join(f"{kind}: {count:,}" for kind, count in counts.items() if count)

    def _save(self) -> None:
        """Write all rows in the order of the paths; a temporary file is renamed, so that the list is always complete."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            with _open(temporary, "w") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows[path] for path in sorted(self.rows))
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, dict[str, str]]:
    reader = csv.DictReader(text_lines(path, newline=""))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise DataError(f"{path} is not a list of photographs that --detector wrote: name another output folder")
    return {row["path"]: row for row in reader if None not in row.values() and None not in row}


def _open(path: Path, mode: str) -> IO[str]:
    # File names may have any encoding.
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")
