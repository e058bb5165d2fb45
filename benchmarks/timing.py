"""The one place where time is taken: interleaved rounds, medians, and ratios within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

Step = Callable[[int], object]  # one whole step on the batch of that number
Timer = Callable[[Step, int, str], float]

HEAD_START = 10_000_000  # cycles, about 5 ms: longer than the host takes to launch a step


class StepFailed(RuntimeError):
    """The step of the contestant of that name raised; the cause is its error."""

    def __init__(self, name: str):
        super().__init__(f"the step of {name} failed")
        self.name = name


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_once(step: Step, turn: int, device: str) -> float:
    """Seconds of one step: wall clock on a CPU, from event to event on a GPU."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step(turn)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_seconds = time.perf_counter()
    step(turn)
    return time.perf_counter() - begin_seconds


def time_queued(step: Step, turn: int, device: str) -> float:
    """Seconds the device takes for one step whose launches all wait for it, as behind a busy network's.

    A kernel is otherwise timed with the host's launch of it, which can take as long as the kernel. A step that
    itself waits for the device is still timed as a user would see it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START)
    begin.record()
    step(turn)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(
    steps: Mapping[str, Step], rounds: int, device: str, seed: int = 0, timer: Timer = time_once
) -> Iterator[dict[str, float]]:
    """Yield, round by round, the seconds of every contestant.

    Each round runs all of them on the same batch, one after another, so that what disturbs the
    machine for a while disturbs all alike. The order changes from round to round, so that nobody
    always runs in the caches that the same predecessor left. Raises StepFailed for the first step
    that fails; a round that is not whole yields nothing.
    """
    order = list(steps)
    shuffle = random.Random(seed).shuffle
    for turn in range(rounds):
        shuffle(order)
        times = {}
        for name in order:
            try:
                times[name] = timer(steps[name], turn, device)
            except Exception as error:
                raise StepFailed(name) from error
        yield times


def fastest(variants: Mapping[str, Step], device: str, rounds: int = 3, timer: Timer = time_once) -> dict[str, float]:
    """Median seconds of every variant of one contestant that is worth a second look.

    The first call is not counted (it compiles, allocates, starts threads). A variant that then
    takes over three times the best is out at once: its time is kept, it is not run again.
    """
    seconds: dict[str, list[float]] = {}
    for name, step in variants.items():
        step(0)
        seconds[name] = [timer(step, 0, device)]
    limit = 3 * min(first for (first,) in seconds.values())
    remaining = {name: variants[name] for name, (first,) in seconds.items() if first <= limit}
    if len(remaining) > 1:
        for times in interleaved(remaining, rounds, device, timer=timer):
            for name, value in times.items():
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return lower, median, upper


def duration(seconds: float) -> str:
    """At most three digits, in µs or ms."""
    scale, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms")
    return f"{seconds * scale:,.0f} {unit}" if seconds * scale >= 100 else f"{seconds * scale:.3g} {unit}"


def ratio(samples: list[float], reference: list[float]) -> float:
    """Median over rounds of one contestant's time divided by the reference's in the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(samples, reference, strict=True))
