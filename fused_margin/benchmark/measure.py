"""Measures the contestants: checks, times in turns, and memory in fresh processes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from . import heads, peak_memory
from .contestants import Contestant
from .heads import Comparison, Head, time_phases, unit_inputs
from .losses import WORKSPACE_MB
from .memory import does_not_fit, high_water, is_out_of_memory, mark, measures_peaks
from .peak_memory import Job, Peak
from .problems import Inputs, Shape, truth
from .results import Problem, Row
from .timing import StepFailed, fastest, surviving


@dataclass(frozen=True)
class HeadJob(Job):
    """The measurement of one contestant's memory."""

    comparison: Comparison


@dataclass(frozen=True)
class Measurement:
    """How the contestants are measured."""

    comparison: Comparison
    device: str
    rounds: int
    warmup: int
    say: Callable[[str], object]

    def times(self, problem: Problem) -> None:
        """Check the loss of every contestant, then time all of them in turns."""
        inputs = unit_inputs(problem.shape, self.device, dtype=self.comparison.torch_dtype)
        exact = None
        if self.comparison.peers:
            exact = float(truth(self.comparison.loss, inputs.embeddings[0], inputs.weight, inputs.labels[0]).loss)
        steps: dict[str, Head] = {}
        for contestant in heads.contestants(self.comparison):
            self.say(f"{problem.shape.label}: prepare {contestant.name}")
            row = Row(contestant.name)
            problem.rows.append(row)
            with _noting_failure(row):
                step = self._choose(row, contestant, inputs, exact)
                if row.failure is None:
                    steps[row.name] = step
        steps[heads.ALONE] = heads.alone(self.comparison, inputs)
        self.say(f"{problem.shape.label}: time {self.rounds} rounds")

        def drop(failed: StepFailed) -> None:
            row = problem.row(failed.name)
            row.rounds, row.failure = [], _reason(failed.__cause__ or failed)

        every = list(steps.values())
        total = self.warmup + self.rounds
        for number, times in enumerate(surviving(steps, total, self.device, time_phases, drop)):
            if number >= self.warmup:
                for name, phases in times.items():
                    problem.row(name).rounds.append(phases)
        for step in every:
            step.close()

    def _choose(self, row: Row, contestant: Contestant[Head], inputs: Inputs, exact: float | None) -> Head:
        """The fastest variant. If a loss is wrong, the row says so."""
        variants = {name: build(inputs) for name, build in contestant.variants.items()}
        for name, step in variants.items():
            if exact is None:
                break
            error = abs(step.forward(0).item() / exact - 1)
            row.loss_error = max(error, row.loss_error or 0.0)
            if not error <= contestant.loss_tolerance:  # also for NaN
                row.failure = f"wrong: relative error {error:.1e} of the loss of {name}"
                return step
        if len(variants) > 1:
            row.variants = fastest(variants, self.device)
            row.variant = min(row.variants, key=row.variants.__getitem__)
        else:
            (row.variant,) = variants
        return variants[row.variant]

    def memory(self, problem: Problem) -> None:
        for row in problem.rows:
            if row.failure is None and measures_peaks(self.device):
                self.say(f"{problem.shape.label}: memory of {row.name}")
                job = HeadJob(
                    row.name, row.variant, problem.shape, self.device, torch.get_num_threads(), self.comparison
                )
                peak = peak_memory.measure_apart(peak_of_steps, job)
                row.peak_bytes, row.held_bytes, row.failure = peak.bytes, peak.held, peak.failure


def peak_of_steps(job: HeadJob) -> Peak:
    """The peak of two steps above the memory before them, and the memory that the head releases at its end.

    Two steps come first: they load code, compile, and create the momentum.
    """
    contestant = next(each for each in heads.contestants(job.comparison) if each.name == job.contestant)
    inputs = unit_inputs(job.shape, job.device, batches=1, dtype=job.comparison.torch_dtype)
    head = contestant.variants[job.variant](inputs)
    inputs.weight = torch.empty(0, dtype=torch.float32, device="cpu")  # the head has its own
    for turn in range(2):
        head(turn)
    before = mark(job.device)
    for turn in range(2):
        head(turn)
    peak = max(0, high_water(job.device) - before)
    after = mark(job.device)
    head.close()
    del head
    gc.collect()
    return Peak(peak, held=after - mark(job.device))


def needed_bytes(shape: Shape, comparison: Comparison) -> int:
    """About the memory that `Measurement.times` takes, which holds the heads of all contestants at once."""
    itemsize = comparison.torch_dtype.itemsize
    elements, logits = shape.classes * shape.dim, shape.rows * shape.classes
    contestants = heads.contestants(comparison)
    weights = (
        1 + 2 * sum(len(each.variants) for each in contestants) + 1
    )  # inputs; with momentum; forward and backward alone
    inputs = max(0, 4 - itemsize) * elements  # in float32 before their conversion
    if not comparison.peers:
        return inputs + (weights + 1) * itemsize * elements + WORKSPACE_MB * 2**20
    # Gradient, normalized weights and their gradient; logits, their exponentials and their gradient.
    step = 3 * itemsize * (elements + logits)
    exact = 2 * 8 * elements + 4 * 8 * 32 * shape.classes  # of the float64 loss, which processes 32 samples at a time
    return inputs + max(itemsize * elements + exact, weights * itemsize * elements + step)


@contextmanager
def _noting_failure(row: Row) -> Iterator[None]:
    """Record why a contestant cannot run, so that the others are still measured."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - any error is recorded
        row.failure = _reason(error)


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return does_not_fit(error)
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.160}"
