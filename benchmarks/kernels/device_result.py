"""A committed result of a GPU, benchmarks/results/<device>.json, by section and contestant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fused_margin._ops.backends import select
from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.timing import quartiles

from ..common.files import RESULTS
from ..comparison.report import Section
from . import names
from .names import ours


@dataclass(frozen=True)
class DeviceResult:
    content: dict[str, Any]
    name: str  # of the file

    @classmethod
    def read(cls, path: Path) -> DeviceResult:
        return cls(json.loads(path.read_text()), path.name)

    @property
    def file(self) -> str:
        return f"benchmarks/results/{self.name}"

    @property
    def gpu(self) -> str:
        return self.content["hardware"]["gpu"]

    @property
    def is_of_kernels(self) -> bool:
        """Whether the file is a report of the kernels suite on a GPU."""
        content = self.content if isinstance(self.content, dict) else {}
        hardware, suites = content.get("hardware"), content.get("suites")
        return isinstance(hardware, dict) and "gpu" in hardware and not set(names.SUITES).isdisjoint(suites or ())

    @property
    def sections(self) -> list[Section]:
        suites = self.content["suites"].items()
        return [Section.from_summary(suite, summary) for suite, summaries in suites for summary in summaries]

    def section(self, suite: str, shape: Shape | None = None) -> Section:
        """The last section of a suite and shape (any shape if None); an empty section if there is none."""
        found = [each for each in self.sections if each.suite == suite and shape in (None, each.shape)]
        return found[-1] if found else Section(suite, shape)

    @property
    def backend(self) -> str:
        """The first family, in the order of backends/select.py, that was timed; PORTABLE if none was."""
        timed = {e.name for each in self.sections if each.suite in names.SUITES for e in each.entries if e.seconds}
        return next((f.name for f in select.FAMILIES if ours(f.name) in timed), select.PORTABLE)


def median(section: Section, name: str) -> float | None:
    entry = section.find(name)
    return quartiles(entry.seconds)[1] if entry and entry.seconds else None


def newest() -> DeviceResult | None:
    """The newest result of a GPU in benchmarks/results with all peers, else the newest; None if there is none."""
    found = [each for each in map(DeviceResult.read, sorted(RESULTS.glob("*.json"))) if each.is_of_kernels]

    def order(result: DeviceResult) -> tuple[bool, str]:
        command = result.content.get("benchmark_command") or ""
        return "--no-compiled" not in command, result.content.get("date", "")

    return max(found, key=order, default=None)
