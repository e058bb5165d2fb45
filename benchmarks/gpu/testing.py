"""Runs the CUDA tests on a device. After a process that loses its device or hangs, another continues with the next test."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from .outcomes import SELECTION, Outcomes, read
from .steps import FAILED, LEAST_SECONDS, NOT_RUN, STOPPED, TIMED_OUT, Steps

SUITE = "tests/cuda"
MOST_PROCESSES = 6  # of one group, one after another
BRING_UP_SECONDS, ALL_SECONDS = 75, 90
HANG_SECONDS = 30
# The tests that a family must pass before it is timed.
BRING_UP = "integers or exponent_sum or nearest or ties or losses"
SANITIZER_HANG_SECONDS = 60
SANITIZER_SECONDS = 75
SANITIZER = (
    "compute-sanitizer", "--launch-timeout=0", "--target-processes=all", "--report-api-errors=no",
    "--kernel-name=kns=_ZN2fm4cuda", "--error-exitcode=99",
)  # fmt: skip
# On Hopper, racecheck of CUDA 13.0 fails with a hardware exception in cuBLAS's half-precision products, which it does not
# instrument.
WITHOUT_HALF_PRODUCTS = ("racecheck",)


class Tests:
    """Runs tests/cuda."""

    def __init__(self, steps: Steps, python: str):
        self.steps, self.python = steps, python

    def bring_up(self, family: str) -> Outcomes:
        return self._run(f"{family}: bring-up", BRING_UP_SECONDS, ["-k", f"{SELECTION[family]} and ({BRING_UP})"])

    def all_of(self, group: str) -> Outcomes:
        return self._run(f"{group}: all tests", ALL_SECONDS, ["-k", SELECTION[group]])

    def sanitize(self, tool: str, group: str, tests: Sequence[str] = ()) -> Outcomes | None:
        """Run the small tests of a group, or the named ones, under a tool of compute-sanitizer; None if no time is left.

        Caching of device memory is off, so that every tensor has its own bounds.
        """
        if self.steps.left() < 2 * LEAST_SECONDS:
            self.steps.finish(f"{tool}, {group}", STOPPED, 0.0, "no time left")
            return None
        marker = "cuda" if tests else "cuda and sanitizer"
        if tool in WITHOUT_HALF_PRODUCTS:
            marker += " and not half_products"
        return self._run(
            f"{tool}, {group}", SANITIZER_SECONDS, list(tests) or ["-k", SELECTION[group]],
            under=[SANITIZER[0], f"--tool={tool}", *SANITIZER[1:]], marker=marker,
            hang_seconds=SANITIZER_HANG_SECONDS, optional=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )  # fmt: skip

    def _run(
        self, name: str, seconds: float, selected: list[str], *, under: Sequence[str] = (), marker: str = "cuda",
        hang_seconds: float | None = None, optional: bool = False, **environment: str,
    ) -> Outcomes:  # fmt: skip
        """`selected`: an expression for -k, or node IDs."""
        named = set(selected)
        if selected[0] == "-k":
            selected = [SUITE, *selected]
        outcomes = Outcomes()
        end = self.steps.elapsed() + min(seconds, self.steps.left())
        with tempfile.TemporaryDirectory() as directory:
            record = Path(directory) / "tests.jsonl"
            for process in range(1, MOST_PROCESSES + 1):
                step = self.steps.run(
                    name if process == 1 else f"{name}, process {process}", end - self.steps.elapsed(),
                    [
                        *under, self.python, "-m", "pytest", *selected, "-m", marker, "-p", "benchmarks.gpu.recorder",
                        f"--record={record}", f"--hang-seconds={hang_seconds or HANG_SECONDS}", "--capture=sys", "-q", "-rf",
                        "--tb=short", "--durations=3",
                    ],
                    optional=optional, **environment,
                )  # fmt: skip
                begun, outcomes = len(outcomes.tests), read(record)
                if step.state in (TIMED_OUT, STOPPED):
                    outcomes.drop_last()
                outcomes.complete |= named <= set(outcomes.tests)
                no_progress = len(outcomes.tests) == begun  # a process that began no test
                if outcomes.complete or no_progress or step.state in (NOT_RUN, STOPPED, TIMED_OUT):
                    break
                if end - self.steps.elapsed() < LEAST_SECONDS:
                    break
        if under and step.state == FAILED and outcomes.passed:
            outcomes.tests[name], outcomes.reasons[name] = "failed", "the tool reports errors; see the log"
        return outcomes
