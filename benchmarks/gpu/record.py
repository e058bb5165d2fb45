"""The result of a run on a device: one JSON file with tests, times, hardware and versions."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..common.files import write_json
from .outcomes import Outcomes
from .steps import Steps

SOURCES = ("csrc/**/*", "fused_margin/_ops/**/*.py")


def kernel_sources(root: Path) -> str:
    """SHA-256 of the kernels and of the Python code that calls them. Equal hashes mean the same code."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()}):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def commit_of(root: Path) -> str | None:
    try:
        result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return None
    return result.stdout.strip() or None


def without_output(command: str | None) -> str | None:
    """The command without its output folder on this machine."""
    return command and re.sub(r" --output \S+", "", command)


def merge_times(earlier: dict, later: dict) -> dict:
    """The later report of `python -m benchmarks`, completed with sections of an earlier one that it has not timed."""
    if not later:
        return earlier
    suites = {name: list(sections) for name, sections in later.get("suites", {}).items()}
    for name, sections in earlier.get("suites", {}).items():
        timed = [section["shape"] for section in suites.get(name, []) if is_timed(section)]
        kept = [section for section in sections if section["shape"] not in timed]
        shapes = [section["shape"] for section in kept]
        suites[name] = kept + [section for section in suites.get(name, []) if section["shape"] not in shapes]
    return {**later, "suites": suites}


def is_timed(section: dict) -> bool:
    return any(contestant["seconds"] for contestant in section["contestants"])


def failures_of(suites: dict, prefix: str) -> list[str]:
    """Contestants whose name begins with `prefix` and that failed or were wrong; running out of memory is allowed."""
    return [
        f"{suite}: {entry['name']}: {entry['failure']}"
        for suite, sections in suites.items()
        for section in sections
        for entry in section["contestants"]
        if entry["name"].startswith(prefix) and entry.get("failure") and "does not fit" not in entry["failure"]
    ]


@dataclass
class Record:
    """Written after every step, since a run may end at any time."""

    path: Path
    times: tuple[Path, ...]  # files of `python -m benchmarks kernels`, the first times first
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

    def all_times(self) -> dict:
        """Times of this call, and of the earlier call where this one has none."""
        keys = ("date", "complete", "threads", "suites", "edge_checks", "targets")
        times = {key: value for key, value in self.of_same_sources().items() if key in keys}
        if "benchmark_command" in self.of_same_sources():
            times["command"] = self.of_same_sources()["benchmark_command"]
        for path in self.times:
            times = merge_times(times, json.loads(path.read_text()) if path.exists() else {})
        return times

    def summary(self) -> dict:
        earlier, times = self.of_same_sources(), self.all_times()
        sanitizers = dict(earlier.get("sanitizers", {}))
        for tool, groups in self.sanitizers.items():
            sanitizers[tool] = sanitizers.get(tool, {}) | {name: each.summary() for name, each in groups.items()}
        return {
            **times,
            "command": self.command,
            "benchmark_command": without_output(times.get("command")),
            "commit": self.commit,
            "kernel_sources": self.sources,
            "hardware": times.get("hardware", {}) | self.machine["hardware"],
            "versions": times.get("versions", {}) | self.machine["versions"],
            "tests": earlier.get("tests", {}) | {name: each.summary() for name, each in self.tests.items()},
            "sanitizers": sanitizers,
            "steps": [asdict(step) | {"seconds": round(step.seconds, 1)} for step in self.steps.done],
        }

    def write(self) -> None:
        write_json(self.path, self.summary())
