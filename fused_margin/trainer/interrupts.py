"""Ctrl-C and termination as a flag, so that training stops between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop."""


@dataclass
class StopRequest:
    """Whether SIGINT or SIGTERM has come."""

    made: bool = False


@contextmanager
def watch_for_stop() -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM in what this yields; let the second one interrupt."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True

    previous = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
