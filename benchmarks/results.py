"""What a run found, what it ran on, and the file both are written to."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_margin as fm

from . import kernels
from .edges import Check
from .peers import Contestant
from .problems import Shape
from .timing import quartiles, ratio

PEERS = ("pytorch-metric-learning", "triton", "cut-cross-entropy", "liger-kernel")
TITLES = {"step": "ArcFace step, forward + backward", "exclusive": "Exclusive term, forward + backward"}


@dataclass
class Entry:
    """One contestant in one section. What was not measured stays empty."""

    name: str
    objective: str
    reference: str
    variant: str = ""
    variants: dict[str, float] = field(default_factory=dict)  # median seconds of a first look
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
        """The worse of the two gradients; None where none was computed."""
        return max((self.errors[key] for key in self.errors if key != "loss"), default=None)


@dataclass
class Section:
    """All contestants on one problem."""

    suite: str
    shape: Shape
    entries: list[Entry] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The problem in words; of classes among themselves there are no embeddings."""
        label = self.shape.label
        if self.suite == kernels.MACHINE:
            return "copy and matrix product"
        return label if self.suite not in ("exclusive", kernels.NEAREST) else label[label.index("D=") :]

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
        """Time of one over time of the other, where both were timed."""
        mine, theirs = self.find(name), self.find(reference)
        if mine and theirs and mine.seconds and theirs.seconds:
            return ratio(mine.seconds, theirs.seconds)
        return None

    @classmethod
    def from_summary(cls, suite: str, summary: dict[str, Any]) -> Section:
        """What `summary` made a dict of."""
        names = [each.name for each in fields(Entry)]
        entries = [Entry(**{name: row[name] for name in names if name in row}) for row in summary["contestants"]]
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


@dataclass
class Report:
    """Everything one run found; sections appear as they begin and fill as they are measured."""

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
            "format": 1,
            "command": self.command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "complete": self.complete,
            "hardware": hardware(self.device),
            "versions": versions(),
            "threads": self.threads,
            "suites": suites,
            "edge_checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
        }

    def write(self, path: Path, verdicts: list[Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = self.summary() | {"targets": [asdict(verdict) for verdict in verdicts]}
        unfinished = path.with_name(path.name + ".unfinished")  # the file itself is never half written
        unfinished.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(path)


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    facts = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        facts |= {
            "gpu": gpu.name,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_multiprocessors": gpu.multi_processor_count,
            "gpu_memory_bytes": gpu.total_memory,
        }
    return facts


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fused_margin": fm.build_info(),
    } | {name.replace("-", "_"): version(name) for name in PEERS if _installed(name)}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
