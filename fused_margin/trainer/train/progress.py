"""Training progress: a live bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.25
LINE_SECONDS = 10.0


class TrainingProgress:
    """Shows epoch, loss, learning rate, images per second and time left."""

    def __init__(self, console: Console, step: int, total_steps: int, epochs: int) -> None:
        self.console, self.total_steps, self.epochs = console, total_steps, epochs
        self._first_step = step
        self._started = self._shown = time.monotonic()
        self._images = 0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=step, epoch=1, epochs=epochs, numbers="")
            self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def due(self, step: int, num_images: int) -> bool:
        """Count a step of `num_images`; return whether to show the progress."""
        self._images += num_images
        interval = LINE_SECONDS if self._bar is None else REFRESH_SECONDS
        return step == self.total_steps or time.monotonic() - self._shown >= interval

    def show(self, step: int, loss: float, lr: float) -> None:
        """Update the bar or print a line."""
        now = self._shown = time.monotonic()
        elapsed = now - self._started
        epoch = min(self.epochs, 1 + step * self.epochs // self.total_steps)
        speed = self._images / elapsed
        numbers = f"loss {loss:.3f}  lr {lr:.2g}  {speed:,.0f} images/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, epoch=epoch, numbers=numbers)
        else:
            left = elapsed / (step - self._first_step) * (self.total_steps - step)
            self.console.print(
                f"epoch {epoch}/{self.epochs}  step {step}/{self.total_steps}  {numbers}  "
                f"left {timedelta(seconds=round(left))}",
                highlight=False,
            )
