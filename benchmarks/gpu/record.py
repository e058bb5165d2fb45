"""What a run on a device leaves behind: one JSON file with its tests, its times, and what it ran on."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .outcomes import Outcomes
from .steps import Steps

SOURCES = ("csrc/**/*", "fused_margin/ops/**/*.py")


def kernel_sources(root: Path) -> str:
    """SHA-256 of the kernels and of the Python that calls them: results with the same one are of the same code."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()}):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def commit_of(root: Path) -> str | None:
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


@dataclass
class Record:
    """Written after every step: a run may end at any time."""

    path: Path
    times: Path  # what `python -m benchmarks kernels` writes
    command: str
    commit: str | None
    sources: str
    machine: dict  # see __main__.DESCRIBE
    steps: Steps
    earlier: dict = field(default_factory=dict)  # the content of an earlier file
    tests: dict[str, Outcomes] = field(default_factory=dict)
    sanitizers: dict[str, dict[str, Outcomes]] = field(default_factory=dict)

    def of_same_sources(self) -> dict:
        return self.earlier if self.earlier.get("kernel_sources") == self.sources else {}

    def summary(self) -> dict:
        earlier = self.of_same_sources()
        times = json.loads(self.times.read_text()) if self.times.exists() else {}
        if not times:  # an earlier call's
            keys = ("date", "complete", "threads", "suites", "edge_checks", "targets")
            times = {key: earlier[key] for key in keys if key in earlier}
        sanitizers = dict(earlier.get("sanitizers", {}))
        for tool, groups in self.sanitizers.items():
            sanitizers[tool] = sanitizers.get(tool, {}) | {name: each.summary() for name, each in groups.items()}
        return {
            **times,
            "command": self.command,
            "benchmark_command": times.get("command", earlier.get("benchmark_command")),
            "commit": self.commit,
            "kernel_sources": self.sources,
            "hardware": times.get("hardware", {}) | self.machine["hardware"],
            "versions": times.get("versions", {}) | self.machine["versions"],
            "tests": earlier.get("tests", {}) | {name: each.summary() for name, each in self.tests.items()},
            "sanitizers": sanitizers,
            "steps": [asdict(step) | {"seconds": round(step.seconds, 1)} for step in self.steps.done],
        }

    def write(self) -> None:
        self.path.write_text(json.dumps(self.summary(), indent=1, ensure_ascii=False) + "\n")
