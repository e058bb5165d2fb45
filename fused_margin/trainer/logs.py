"""The course of a run: log.csv and TensorBoard's curves, which go on where a resumed run does."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import tensorboard  # noqa: F401 - Fabric's logger needs it, and would say so only when the run has begun
from lightning.fabric.loggers import TensorBoardLogger

LOG_NAME = "log.csv"
CURVES_NAME = "tensorboard"


class RunLog:
    """Named values of steps, written as they come.

    Fabric's CSVLogger deletes the file of an earlier process; this one keeps it up to the step at which the
    checkpoint was taken, so that no step is missing or there twice.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / LOG_NAME
        columns, rows = _read(self._path)
        rows = [row for row in rows if int(row["step"]) <= step]
        self._columns = columns if rows else ["step"]
        self._last_step = int(rows[-1]["step"]) if rows else 0
        self._rewrite(rows)
        # Points of later steps are hidden: they are about to be drawn again.
        self._curves = TensorBoardLogger(folder, name="", version=CURVES_NAME, purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add values of a step, not before the last one's."""
        row = {"step": str(step), **{name: f"{value:.7g}" for name, value in values.items()}}
        new_columns = [name for name in row if name not in self._columns]
        if new_columns or step == self._last_step:
            self.flush()
            self._columns += new_columns
            _, rows = _read(self._path)
            if step == self._last_step and rows:
                row = rows.pop() | row
            self._file.close()
            self._rewrite([*rows, row])
        else:
            self._writer.writerow(row)
        self._last_step = step
        self._curves.log_metrics(values, step)

    def flush(self) -> None:
        """Hand everything to the operating system: a killed process loses nothing of it."""
        self._file.flush()
        self._curves.save()

    def close(self) -> None:
        self._file.close()
        self._curves.finalize("success")

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        """Put a new file in the place of the old, and leave it open for more rows."""
        temporary = self._path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self._path)
        self._file = open(self._path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - until `close`
        self._writer = csv.DictWriter(self._file, self._columns)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and whole rows; a kill can leave half of the last one."""
    if not path.exists():
        return [], []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = [row for row in reader if None not in row.values()]
    return list(reader.fieldnames or []), rows
