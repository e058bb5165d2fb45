"""Consoles, exit codes and signals of the commands."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fused_margin.trainer.train.checkpoint import CheckpointError, latest_run

RUNS = Path("runs")
FAILED, INVALID, INTERRUPTED = 1, 2, 130  # tyro also exits with 2 for invalid options


def command_consoles(*, quiet: bool = False) -> tuple[Console, Console]:
    """Consoles for stdout, which `quiet` disables, and stderr."""
    # File names may have any encoding, and must not raise an error when printed.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # File names may look like markup or emoji codes.
    return Console(quiet=quiet, markup=False, emoji=False), Console(stderr=True, markup=False, emoji=False)


def failed(errors: Console, error: Exception, code: int = FAILED) -> int:
    """Print an error; returns the exit code."""
    errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
    return code


def find_latest_run(purpose: str, option: str) -> Path:
    """The folder of the latest run; `purpose` and `option` are for the error message.

    Raises:
        CheckpointError: there is no run.
    """
    latest = latest_run(RUNS)
    if latest is None:
        raise CheckpointError(f"no run to {purpose} in {RUNS}/; name its folder with {option}")
    return latest


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, as on Ctrl-C, instead of ending the process immediately."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
