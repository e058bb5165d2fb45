"""The log of a run: log.csv and TensorBoard curves, which a resumed run continues."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorboard  # noqa: F401 - Fabric's logger needs it, but reports its absence only when the run has begun
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

LOG_NAME = "log.csv"
CURVES_NAME = "tensorboard"


class RunLog:
    """Appends named values of steps.

    Fabric's CSVLogger deletes the file of an earlier process. This class keeps the rows up to the step that a run
    resumes from, so that no step is missing or duplicated.
    """

    def __init__(self, folder: Path, step: int, columns: Sequence[str]) -> None:
        """
        Args:
            folder: of the run.
            step: of the checkpoint that the run resumes from; 0 for a new run.
            columns: names of all values that will be written.
        """
        path = folder / LOG_NAME
        header, rows = read_log(path)
        rows = [row for row in rows if int(row["step"]) <= step]
        names = dict.fromkeys(["step", *(header if rows else ()), *columns])
        temporary = path.with_suffix(".tmp")
        self._file = open(temporary, "w", newline="", encoding="utf-8")  # noqa: SIM115 - until `close`
        self._writer = csv.DictWriter(self._file, list(names))
        self._writer.writeheader()
        self._last_row: dict[str, str] = {}
        for row in rows:
            self._append(row)
        self._file.flush()
        os.replace(temporary, path)
        # TensorBoard hides the points of later steps, which will be written again.
        self._curves = TensorBoardLogger(folder, name="", version=CURVES_NAME, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of the last written step or of a later one."""
        row = {"step": str(step), **{name: f"{value:.7g}" for name, value in values.items()}}
        if self._last_row.get("step") == row["step"]:
            self._file.seek(self._last_position)
            self._append(self._last_row | row)
            self._file.truncate()
        else:
            self._append(row)
        self._curves.log_metrics(values, step)

    def flush(self) -> None:
        """Hand all rows to the operating system, so that they survive a kill of the process."""
        self._file.flush()
        self._curves.save()

    def close(self) -> None:
        self._file.close()
        self._curves.finalize("success")

    def _append(self, row: dict[str, str]) -> None:
        self._last_row, self._last_position = row, self._file.tell()
        self._writer.writerow(row)


def read_log(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and complete rows; a kill can leave an incomplete last row."""
    if not path.exists():
        return [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]
    return list(reader.fieldnames or []), rows
