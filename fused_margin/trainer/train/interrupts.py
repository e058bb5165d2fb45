"""SIGINT and SIGTERM as a flag, so that training stops after a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(Exception):
    """A signal stopped the run."""


@dataclass
class StopRequest:
    """Whether SIGINT or SIGTERM was received."""

    made: bool = False


@contextmanager
def watch_for_stop() -> Iterator[StopRequest]:
    """Yield a `StopRequest` that the first SIGINT or SIGTERM sets. The second one raises KeyboardInterrupt."""
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
