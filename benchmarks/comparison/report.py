"""The report of a run: entries of contestants, sections of suites, and the JSON file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fused_margin.benchmark.contestants import Contestant
from fused_margin.benchmark.environment import header
from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.timing import quartiles, ratio

from ..common.files import write_json
from ..kernels import names
from .edges import Check

TITLES = {"step": "ArcFace step, forward + backward", "exclusive": "Exclusive term, forward + backward"}


@dataclass
class Entry:
    """One contestant in one section. Values that were not measured stay empty."""

    name: str
    objective: str
    reference: str
    variant: str = ""
    variants: dict[str, float] = field(default_factory=dict)  # median seconds of each, when the fastest was chosen
    seconds: list[float] = field(default_factory=list)  # one per round
    errors: dict[str, float] = field(default_factory=dict)  # relative, against float64
    peak_bytes: int | None = None
    failure: str | None = None
    work: float | None = None  # bytes or operations of one step

    @property
    def rate(self) -> float | None:
        """Bytes or operations a second."""
        return self.work / quartiles(self.seconds)[1] if self.work and self.seconds else None

    @property
    def largest_error(self) -> float | None:
        return max(self.errors.values(), default=None)

    @property
    def gradient_error(self) -> float | None:
        """The larger error of the two gradients; None if no error was computed."""
        return max((self.errors[key] for key in self.errors if key != "loss"), default=None)


@dataclass
class Section:
    """All contestants on one problem."""

    suite: str
    shape: Shape
    entries: list[Entry] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The sizes of the problem; N is left out where only classes are compared."""
        label = self.shape.label
        if self.suite == names.MACHINE:
            return "copy and matrix product"
        return label if self.suite not in ("exclusive", names.NEAREST) else label[label.index("D=") :]

    @property
    def title(self) -> str:
        return f"{TITLES.get(self.suite, self.suite.capitalize())}: {self.label}"

    def add(self, contestant: Contestant) -> Entry:
        entry = Entry(contestant.name, contestant.objective, contestant.reference, work=contestant.work)
        self.entries.append(entry)
        return entry

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)

    def ratio(self, name: str, reference: str) -> float | None:
        """Time of `name` over time of `reference`; None unless both were timed."""
        mine, theirs = self.find(name), self.find(reference)
        if mine and theirs and mine.seconds and theirs.seconds:
            return ratio(mine.seconds, theirs.seconds)
        return None

    @classmethod
    def from_summary(cls, suite: str, summary: dict[str, Any]) -> Section:
        """The inverse of :meth:`summary`."""
        keys = [each.name for each in fields(Entry)]
        entries = [Entry(**{key: row[key] for key in keys if key in row}) for row in summary["contestants"]]
        return cls(suite, Shape(**summary["shape"]), entries)

    def summary(self) -> dict[str, Any]:
        rows = []
        for entry in self.entries:
            row = asdict(entry)
            if entry.seconds:
                lower, median, upper = quartiles(entry.seconds)
                row |= {"lower_quartile": lower, "median": median, "upper_quartile": upper}
                row["ratio"] = self.ratio(entry.name, entry.reference)
            rows.append(row)
        return {"shape": asdict(self.shape), "contestants": rows}


@dataclass(frozen=True)
class Verdict:
    """A target, and the value that a run measured."""

    goal: str
    target: str
    measured: str
    met: bool | None  # None for a prediction, which is only compared


@dataclass
class Report:
    """Everything that one run measured. A section is added when it begins, and filled during the measurement."""

    command: str
    device: str
    threads: int
    gpu: str | None = None  # its name
    sections: list[Section] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    complete: bool = False

    def section(self, suite: str, shape: Shape) -> Section:
        self.sections.append(Section(suite, shape))
        return self.sections[-1]

    def of(self, suite: str, shape: Shape | None = None) -> list[Section]:
        return [
            section for section in self.sections if section.suite == suite and (shape is None or section.shape == shape)
        ]

    def summary(self) -> dict[str, Any]:
        suites: dict[str, list[dict[str, Any]]] = {}
        for section in self.sections:
            suites.setdefault(section.suite, []).append(section.summary())
        return {
            **header(self.command, self.device),
            "complete": self.complete,
            "threads": self.threads,
            "suites": suites,
            "edge_checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }

    def write(self, path: Path, verdicts: list[Verdict]) -> None:
        write_json(path, self.summary() | {"targets": [asdict(verdict) for verdict in verdicts]})
