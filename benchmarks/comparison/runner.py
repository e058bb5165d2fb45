"""Runs the suites: times, peak memory, and errors against float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.progress import Progress, TaskID

from fused_margin.benchmark import memory, timing
from fused_margin.benchmark.contestants import Contestant
from fused_margin.benchmark.problems import Answer, Inputs, Shape, make_inputs, relative_error, truth
from fused_margin.benchmark.timing import Step, Timer

from ..common.steps import LossStep
from ..kernels import half, names
from ..kernels.comparisons import Comparison
from ..kernels.comparisons import peak_bytes as peak_bytes_here
from . import peak_memory, peers
from .edges import check_edges
from .report import Entry, Report, Section

TRUTHS = {"arcface", "normface", "exclusive"}  # objectives with a float64 answer


@dataclass
class Runner:
    """Runs suites, fills the report, and shows the progress."""

    report: Report
    progress: Progress
    rounds: int
    warmup: int
    compiled: bool
    only: tuple[str, ...] = ()  # names of contestants; empty for all

    @property
    def device(self) -> str:
        return self.report.device

    def step(self, shape: Shape) -> Section:
        return self._compare("step", shape, self._step_contestants(shape))

    def exclusive(self, shape: Shape) -> Section:
        return self._compare("exclusive", shape, self._wanted(peers.exclusive_contestants()))

    def kernels(self, comparisons: Iterable[Comparison]) -> Iterator[Section]:
        """Sections of the kernels study, each as soon as it is complete."""
        with half.precision("high"):
            for each in comparisons:
                contestants = [one for one in each.contestants if self.compiled or not one.compiled]
                yield self._compare(each.suite, each.shape, self._wanted(contestants))

    def accuracy(self, shape: Shape) -> Section:
        """Errors of the loss and of both gradients on one batch."""
        section = self.report.section("accuracy", shape)
        inputs = make_inputs(shape, self.device, batches=1)
        contestants = [each for each in self._step_contestants(shape) if each.objective in TRUTHS]
        exact = self._truths(contestants, inputs)
        with self._stage(f"accuracy, {shape.label}", len(contestants)) as task:
            for contestant in contestants:
                self._show(task, contestant.name)
                entry = section.add(contestant)
                with _unless_out_of_memory(entry):
                    entry.variant, build = next(iter(contestant.variants.items()))
                    if contestant.objective in exact:
                        entry.errors = _errors(build(inputs), exact[contestant.objective])
                    else:
                        entry.failure = "the float64 answer does not fit"
                self.progress.advance(task)
        self.report.checks = check_edges(self.device)
        return section

    def memory(self, shapes: list[Shape]) -> list[Section]:
        """Peak memory of a step with growing C; an estimate where the machine has too little memory."""
        sections = []
        measured: dict[str, tuple[int, int]] = {}  # name -> (classes, bytes)
        for shape in sorted(shapes, key=lambda shape: shape.classes):
            section = self.report.section("memory", shape)
            sections.append(section)
            contestants = [each for each in self._step_contestants(shape) if each.objective in TRUTHS]
            with self._stage(f"memory, {shape.label}", len(contestants)) as task:
                for contestant in contestants:
                    self._show(task, contestant.name)
                    entry = section.add(contestant)
                    entry.variant = self._chosen(contestant, shape.rows)
                    known = measured.get(contestant.name)
                    self._measure(entry, "step", shape, known)
                    if entry.peak_bytes is not None:
                        measured[contestant.name] = shape.classes, entry.peak_bytes
                    self.progress.advance(task)
        return sections

    def _step_contestants(self, shape: Shape) -> list[Contestant]:
        return self._wanted(peers.step_contestants(shape.rows, self.device, self.compiled))

    def _wanted(self, contestants: list[Contestant]) -> list[Contestant]:
        return [each for each in contestants if not self.only or each.name in self.only]

    def _compare(self, suite: str, shape: Shape, contestants: list[Contestant]) -> Section:
        """Check every contestant, time all of them in turns, then measure the memory of each."""
        section = self.report.section(suite, shape)
        inputs = make_inputs(shape, self.device)
        timer = timing.time_queued if suite in names.QUEUED else timing.time_once
        noting = _noting_failure if suite in names.SUITES else _unless_out_of_memory
        steps: dict[str, Step] = {}
        with self._stage(f"{suite}, {section.label}: check", len(contestants)) as task:
            exact = self._truths(contestants, inputs)
            for contestant in contestants:
                self._show(task, contestant.name)
                entry = section.add(contestant)
                with noting(entry):
                    step = self._choose(entry, contestant, inputs, timer)
                    if contestant.objective in exact and isinstance(step, LossStep):
                        entry.errors = _errors(step, exact[contestant.objective])
                    elif hasattr(step, "errors"):
                        entry.errors = step.errors()
                    entry.failure = _fault(entry, contestant)
                    if entry.failure is None:
                        steps[contestant.name] = step
                self.progress.advance(task)
            del exact

        self._time(section, steps, timer)
        if suite in names.SUITES:
            for name, step in steps.items():
                entry = section.find(name)
                with noting(entry):
                    entry.peak_bytes = peak_bytes_here(step, self.device)
            return section
        steps.clear()

        with self._stage(f"{suite}, {section.label}: memory", len(section.entries)) as task:
            for entry in section.entries:
                self._show(task, entry.name)
                if entry.objective in TRUTHS and entry.failure is None:
                    self._measure(entry, suite, shape)
                self.progress.advance(task)
        return section

    def _time(self, section: Section, steps: dict[str, Step], timer: Timer) -> None:
        """Fill the times of `section`. A contestant that runs out of memory is dropped; the others continue."""

        def drop(failed: timing.StepFailed) -> None:
            if not memory.is_out_of_memory(failed.__cause__):
                raise failed
            entry = section.find(failed.name)
            entry.seconds, entry.failure = [], memory.does_not_fit(failed.__cause__)

        total = self.warmup + self.rounds
        with self._stage(f"{section.suite}, {section.label}: time", total) as task:
            for number, times in enumerate(timing.surviving(steps, total, self.device, timer, drop)):
                self.progress.advance(task)
                if number >= self.warmup:
                    for name, seconds in times.items():
                        section.find(name).seconds.append(seconds)

    def _choose(self, entry: Entry, contestant: Contestant, inputs: Inputs, timer: Timer) -> Step:
        """The fastest variant; the entry records the times of all."""
        steps = {name: build(inputs) for name, build in contestant.variants.items()}
        if len(steps) > 1:
            entry.variants = timing.fastest(steps, self.device, timer=timer)
            entry.variant = min(entry.variants, key=entry.variants.__getitem__)
        else:
            (entry.variant,) = steps
        return steps[entry.variant]

    def _chosen(self, contestant: Contestant, rows: int) -> str:
        """The variant that was fastest for this N earlier in this run, else the first."""
        for section in self.report.of("step"):
            entry = section.find(contestant.name)
            if section.shape.rows == rows and entry and entry.variant in contestant.variants:
                return entry.variant
        return next(iter(contestant.variants))

    def _measure(self, entry: Entry, suite: str, shape: Shape, known: tuple[int, int] | None = None) -> None:
        if known is not None:
            classes, peak = known
            needed = peak_memory.static_bytes(shape) + peak * shape.classes // classes
            if needed > memory.USABLE * memory.available_bytes(self.device):
                entry.failure = f"does not fit: would need about {needed / 2**30:.0f} GiB"
                return
        job = peak_memory.Job(entry.name, entry.variant, shape, self.device, self.report.threads, suite)
        peak = peak_memory.measure(job)
        entry.peak_bytes, entry.failure = peak.bytes, peak.failure

    def _truths(self, contestants: list[Contestant], inputs: Inputs) -> dict[str, Answer]:
        objectives = {each.objective for each in contestants} & TRUTHS
        batch = inputs.embeddings[0], inputs.weight, inputs.labels[0]
        answers = {}
        for objective in objectives:
            try:
                answers[objective] = truth(objective, *batch)
            except (MemoryError, RuntimeError) as error:  # errors stay unknown, and times are still taken
                if not memory.is_out_of_memory(error):
                    raise
        return answers

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[TaskID]:
        task = self.progress.add_task(name, total=total, detail="")
        if not self.progress.console.is_terminal:
            self.progress.console.print(name)
        try:
            yield task
        finally:
            self.progress.remove_task(task)

    def _show(self, task: TaskID, detail: str) -> None:
        self.progress.update(task, detail=detail)


def _errors(step: LossStep, exact: Answer) -> dict[str, float]:
    answer = step.answer(0)
    errors = {"loss": relative_error(answer.loss, exact.loss)}
    if exact.embeddings is not None:
        errors["embeddings"] = relative_error(answer.embeddings, exact.embeddings)
    return errors | {"weight": relative_error(answer.weight, exact.weight)}


def _fault(entry: Entry, contestant: Contestant) -> str | None:
    for name, error in entry.errors.items():
        tolerance = contestant.loss_tolerance if name == "loss" else contestant.tolerance
        if not error <= tolerance:  # also for NaN
            return f"wrong: relative error {error:.1e} of {name}, tolerated {tolerance:.0e}"
    return None


@contextmanager
def _unless_out_of_memory(entry: Entry) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not memory.is_out_of_memory(error):
            raise
        entry.failure = memory.does_not_fit(error)


@contextmanager
def _noting_failure(entry: Entry) -> Iterator[None]:
    """Record any failure of a peer or a kernel, so that the others are still measured."""
    try:
        with _unless_out_of_memory(entry):
            yield
    except Exception as error:  # noqa: BLE001 - any error is recorded
        entry.failure = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.160}"
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises if this process has lost the device, which ends the run
