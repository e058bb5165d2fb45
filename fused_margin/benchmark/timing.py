"""Timing: interleaved rounds, medians, and ratios within a round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch

Step = Callable[[int], object]  # one whole step on the batch with that number
Timer = Callable[[Step, int, str], float]
S = TypeVar("S", bound=Step)
T = TypeVar("T")

HEAD_START = 10_000_000  # cycles, about 5 ms: longer than the host takes to launch a step


class StepFailed(RuntimeError):
    """The step of the contestant `name` raised an error, which is the cause of this one."""

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
    """Seconds of one step on the device, with all launches queued before the device begins, as after a busy network.

    Otherwise the time of a kernel includes the host's launch, which can take as long as the kernel. A step that
    synchronizes with the device is still timed in full.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START)
    begin.record()
    step(turn)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def moments(device: str) -> tuple[Callable[[], None], Callable[[], list[float]]]:
    """A function that notes the moment of its call, on a GPU that of the device, and one that returns the seconds between."""
    noted: list[Any] = []
    if device != "cuda":
        return lambda: noted.append(time.perf_counter()), lambda: [end - begin for begin, end in pairwise(noted)]
    torch.cuda.synchronize()

    def note() -> None:
        noted.append(torch.cuda.Event(enable_timing=True))
        noted[-1].record()

    def seconds() -> list[float]:
        noted[-1].synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(noted)]

    return note, seconds


def interleaved(
    steps: Mapping[str, S], rounds: int, device: str, timer: Callable[[S, int, str], T], seed: int = 0
) -> Iterator[dict[str, T]]:
    """Yield what the timer returns of every contestant, round by round.

    Contestants are timed in turns on the same batch, so that machine noise affects all alike. The order is shuffled in
    every round, so that no contestant always finds the caches as the same predecessor left them. Raises StepFailed at
    the first step that fails; an incomplete round yields nothing.
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


def surviving(
    steps: dict[str, S],
    rounds: int,
    device: str,
    timer: Callable[[S, int, str], T],
    drop: Callable[[StepFailed], object],
) -> Iterator[dict[str, T]]:
    """As `interleaved`, but after a failed step, `drop` is called, and the other contestants continue.

    The failed contestant is removed from `steps`. An error that `drop` raises ends the rounds.
    """
    done = 0
    while steps and done < rounds:
        try:
            for times in interleaved(steps, rounds - done, device, timer, seed=done):
                done += 1
                yield times
        except StepFailed as failed:
            drop(failed)
            del steps[failed.name]


def fastest(variants: Mapping[str, Step], device: str, rounds: int = 3, timer: Timer = time_once) -> dict[str, float]:
    """Median seconds of every variant of one contestant.

    The first call is not timed (it compiles, allocates and starts threads). A variant whose second call takes more than
    three times as long as the best is not run again.
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
    """Three significant digits, in µs or ms."""
    scale, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms")
    return f"{seconds * scale:,.0f} {unit}" if seconds * scale >= 100 else f"{seconds * scale:.3g} {unit}"


def ratio(samples: list[float], reference: list[float]) -> float:
    """Median over rounds of one contestant's time divided by the reference's in the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(samples, reference, strict=True))
