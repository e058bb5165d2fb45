"""Builds, checks, profiles and times the CUDA kernels on a GPU. Two calls fit into fifteen minutes on a rented device.

First call, at most 430 s with a prebuilt extension (40 s more without):

    python3 -m benchmarks.gpu check profile sanitize --limit 415 --prebuilt build/prebuilt --wheels build/wheels \\
        --commit HASH --output FOLDER

      0 s  missing packages, device, builds                          20 s
     20 s  basic tests of each family in the build that traps        2 x 30 s, at most 75 s each
     80 s  first times of the families that passed                   at most 60 s; the first are ready by 110 s
    140 s  ncu on the three kernels, and the kernels of a step       at most 75 s and 40 s; 160 s are reserved for the rest
    230 s  all tests: each family, portable kernels, search          4 x 30 s, at most 90 s each
    350 s  memcheck of failed tests, then compute-sanitizer on the rest in the remaining time

Second call, at most 270 s: times with all peers, and tests of kernels that failed and were fixed.

    python3 -m benchmarks.gpu time --limit 255 --earlier benchmarks/results/DEVICE.json ...as above
    python3 -m benchmarks.gpu check sanitize time --groups search --limit 255 --earlier ...as above

HASH is the full hash of the commit; a result without it cannot switch anything on. FOLDER receives the result, the log, the
report of ncu and a figure; copy it back from the device.

--prebuilt is the folder that `python3.12 -m benchmarks.gpu prebuild build/prebuilt` writes, with the Python version of the
device and a glibc that is not newer (needs nvcc, setuptools, pybind11 and ninja; 13 MB for both builds). setuptools-scm gives
the version that the result names, 0.0.0 without it. --wheels is a folder of wheels for a machine without a network: `pip
download --no-deps` of tyro, docstring_parser and typeguard, and for `time` of pytorch-metric-learning, cut-cross-entropy and
liger-kernel. git ignores build/, so copy these folders explicitly.

Exit code 0: everything that ran passed, and all requested tests ran. Times, profiles and sanitizers may be incomplete. The
result is DEVICE.json in FOLDER, written after every step; commit it in benchmarks/results, switch on the kernels that passed
(fused_margin/_ops/backends/select.py), and run `python -m benchmarks.publish benchmarks/results/DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..common.files import ROOT, device_slug
from .builds import PLAIN, TRAP, Builds, prebuild
from .outcomes import FAMILIES, PORTABLE, SEARCH, Outcomes, is_clean
from .record import Record, commit_of, failures_of, kernel_sources
from .steps import FAILED, PASSED, Steps
from .testing import Tests

PARTS = ("check", "profile", "sanitize", "time")
NEEDED = ("torch", "numpy", "pytest", "hypothesis", "matplotlib", "rich", "tyro", "docstring_parser", "typeguard")
TO_BUILD = ("setuptools", "pybind11", "ninja")
PEERS = ("pytorch_metric_learning", "cut_cross_entropy", "liger_kernel", "triton")
FIRST_TIMES_SECONDS = 60
TEST_SECONDS = 160  # reserved for the tests while profiling
SANITIZERS = ("memcheck", "racecheck", "synccheck")
NCU_SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis",
)  # fmt: skip
FIND = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))"
DESCRIBE = """
import json
from fused_margin.benchmark.environment import hardware, versions
from benchmarks.kernels import comparisons
if why := comparisons.missing("cuda"):
    raise SystemExit(why)
print(json.dumps(
    {"families": comparisons.available_families(), "hardware": hardware("cuda"), "versions": versions()}
))
"""


def arguments_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parser.add_argument(
        "--groups",
        nargs="+",
        choices=(*FAMILIES, PORTABLE, SEARCH),
        help="tests to run; default: all that the device supports",
    )
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything; default 570")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--prebuilt", type=Path, help="folder written by prebuild; default: build here")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument(
        "--earlier", type=Path, help="result of an earlier call; its tests count if the sources are the same"
    )
    parser.add_argument("--commit", help="hash of the measured commit; default: from git")
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch; default: this one")
    chosen = parser.parse_intermixed_args(arguments)
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        parser.error(f"expected parts among {', '.join(PARTS)}; got {', '.join(unknown)}")
    chosen.parts = chosen.parts or list(PARTS)
    for name in ("output", "prebuilt", "wheels", "earlier"):
        path = getattr(chosen, name)
        if path is not None:
            setattr(chosen, name, path.resolve())
            if name != "output" and not path.exists():
                parser.error(f"--{name}: {path} does not exist")
    return chosen


class Run:
    """One call of the command."""

    def __init__(self, options: argparse.Namespace, root: Path):
        self.options, self.root, self.python = options, root, options.python
        self.gpu, self.driver, capability = self.query_device()
        options.output.mkdir(parents=True, exist_ok=True)
        log = options.output / f"{self.gpu}.log"
        log.write_text("")
        environment = {
            "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        }  # fmt: skip
        self.steps = Steps(options.limit, log, root, environment)
        self.builds = Builds(self.steps, self.python, options.prebuilt, capability)
        self.tests = Tests(self.steps, self.python)
        self.passed: list[str] = []  # families

    def query_device(self) -> tuple[str, str, str]:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            sys.exit(f"No GPU: nvidia-smi does not name one ({error})")
        name, driver, capability = (part.strip() for part in first.split(","))
        return device_slug(name), driver, capability

    def wanted(self, part: str) -> bool:
        return part in self.options.parts

    def main(self, command: str) -> bool:
        try:
            if self.prepare(command):
                self.run_parts()
        except KeyboardInterrupt:
            self.steps.finish("interrupted", FAILED, 0.0)
        if hasattr(self, "record"):
            self.record.write()
            for path in self.record.times:  # the record contains them
                path.unlink(missing_ok=True)
        self.steps.print(f"\n=== summary, {self.steps.elapsed():.0f} s")
        for step in self.steps.done:
            self.steps.print(str(step))
        return not any(step.failed for step in self.steps.done)

    def run_parts(self) -> None:
        groups = self.options.groups or [*self.available, PORTABLE, SEARCH]
        families = [name for name in self.available if name in groups]
        others = [name for name in groups if name not in families]
        if self.wanted("check"):
            self.check(families, others)
            self.passed += [name for name in self.passed_earlier() if name not in groups]
        else:
            self.passed += [name for name in self.passed_earlier() if name in groups]
            if missing := [name for name in families if name not in self.passed]:
                self.steps.finish("earlier tests", FAILED, 0.0, f"not passed with these sources: {' '.join(missing)}")
            if self.passed and self.wanted("profile"):
                self.profile()
        if self.wanted("sanitize"):
            self.sanitize([*self.passed, *others])
        if self.passed and self.wanted("time"):
            self.time()

    def prepare(self, command: str) -> bool:
        """Check packages, build, and describe the machine; False if one of them fails."""
        if self.options.wheels is not None:
            site = tempfile.mkdtemp(prefix="fused-margin-site-")
            wheels = sorted(map(str, self.options.wheels.glob("*.whl")))
            install = [self.python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", f"--target={site}"]
            if self.steps.run("wheels", 60, [*install, *wheels]).failed:
                return False
            self.steps.environment["PYTHONPATH"] += os.pathsep + site
        needed = [*NEEDED, *(() if self.builds.prebuilt else TO_BUILD), *(PEERS if self.wanted("time") else ())]
        missing = subprocess.run(
            [self.python, "-c", FIND, *needed], cwd=self.root, env={**os.environ, **self.steps.environment},
            capture_output=True, text=True, check=True,
        ).stdout.split()  # fmt: skip
        if missing:
            self.steps.finish("packages", FAILED, 0.0, f"missing: {' '.join(missing)} (see --wheels)")
            return False
        if not self.builds.make():
            return False
        self.builds.use(TRAP if self.wanted("check") else PLAIN)
        described = self.options.output / "machine.json"
        code = f"import sys; sys.stdout = open({str(described)!r}, 'w')\n{DESCRIBE}"
        if self.steps.run("machine", 60, [self.python, "-c", code]).failed:
            return False
        machine = json.loads(described.read_text())
        described.unlink()
        machine["hardware"]["driver"] = self.driver
        self.available: list[str] = machine.pop("families")
        asked = self.options.groups or ()
        if absent := [name for name in asked if name in FAMILIES and name not in self.available]:
            self.steps.finish("groups", FAILED, 0.0, f"not in this build or not for this device: {' '.join(absent)}")
            return False
        earlier = json.loads(self.options.earlier.read_text()) if self.options.earlier else {}
        commit = self.options.commit or commit_of(self.root)
        if not re.fullmatch("[0-9a-f]{40}", commit or ""):
            self.steps.print(f"=== no commit ({commit}): the result cannot switch anything on; see --commit")
        output = self.options.output
        self.record = Record(
            output / f"{self.gpu}.json", (output / f"{self.gpu}-first-times.json", output / f"{self.gpu}-times.json"),
            command, commit, kernel_sources(self.root), machine, self.steps, earlier,
        )  # fmt: skip
        for path in self.record.times:
            path.unlink(missing_ok=True)
        self.record.write()
        return True

    def passed_earlier(self) -> list[str]:
        """Families that passed in an earlier call with the same sources. Benchmarks still check the answers."""
        tests = self.record.of_same_sources().get("tests", {})
        return [name for name in self.available if is_clean(tests.get(name)) and tests[name]["passed"]]

    def check(self, families: list[str], others: list[str]) -> None:
        """Basic tests in the build that traps, first times and profiles, all tests, memcheck of the failed ones."""
        for family in reversed(families):  # the simplest first
            found = self.record.tests.setdefault(family, Outcomes())
            found.add(self.tests.bring_up(family))
            self.record.write()
            if found.passed:
                self.passed.insert(0, family)
            else:
                self.report(family)
        failed = [family for family in families if family not in self.passed]
        self.builds.use(PLAIN)
        if self.passed:
            self.first_times()
            if self.wanted("profile"):
                self.profile()
        for group in [*self.passed, *others]:
            found = self.record.tests.setdefault(group, Outcomes())
            outcomes = self.tests.all_of(group)
            found.add(outcomes)
            found.complete = outcomes.complete
            self.record.write()
            if not found.passed or not found.complete:
                self.report(group)
                if group in self.passed:
                    self.passed.remove(group)
        if failed:
            self.builds.use(TRAP)
            for family in failed:
                if tests := self.record.tests[family].failed_tests:
                    self.add_sanitized("memcheck", family, self.tests.sanitize("memcheck", family, tests))
            self.builds.use(PLAIN)

    def report(self, group: str) -> None:
        found = self.record.tests[group]
        counts = f"{len(found.tests)} tests began, {len(found.failed_tests)} failed or did not finish"
        self.steps.finish(group, FAILED, 0.0, counts)

    def benchmark(self, name: str, seconds: float, path: Path, *options: str) -> None:
        """Time the families that passed. A wrong answer of ours is a failure."""
        command = [self.python, "-m", "benchmarks", "kernels", "--device", "cuda", *options, "--families", *self.passed]
        self.steps.run(name, seconds, [*command, "--output", str(path)], optional=True)
        failures = failures_of(json.loads(path.read_text())["suites"], "ours") if path.exists() else []
        for failure in failures:
            self.steps.finish(name, FAILED, 0.0, failure)
        self.record.write()

    def first_times(self) -> None:
        self.benchmark(
            "first times", FIRST_TIMES_SECONDS, self.record.times[0], "--rounds", "5", "--warmup", "1", "--no-compiled"
        )

    def time(self) -> None:
        self.builds.use(PLAIN)
        self.benchmark("times", self.steps.left(), self.record.times[1], "--rounds", "9")

    def profile(self) -> None:
        """Profile the kernels with ncu, and list the kernels of a step."""
        report = self.options.output / f"{self.gpu}-ncu"
        sections = [argument for name in NCU_SECTIONS for argument in ("--section", name)]
        kernels = [self.python, "-m", "benchmarks.gpu.profile", "kernels", *self.passed]
        options = [
            "--clock-control",
            "none",
            "--kernel-name",
            "regex:multiply_tiles",
            *sections,
            "-f",
            "-o",
            str(report),
        ]
        reserved = TEST_SECONDS if self.wanted("check") else 0
        profiled = self.steps.run(
            "ncu", min(75, self.steps.left() - reserved), ["ncu", *options, *kernels], optional=True
        )
        if profiled.state == PASSED:
            self.steps.run(
                "ncu, as text", 20, ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"], optional=True
            )
        self.steps.run(
            "steps by kernel", min(40, self.steps.left() - reserved),
            [self.python, "-m", "benchmarks.gpu.profile", "steps", *self.passed, PORTABLE], optional=True,
        )  # fmt: skip
        self.record.write()

    def sanitize(self, groups: Sequence[str]) -> None:
        """Skip groups that an earlier call found clean with the same sources."""
        earlier = self.record.of_same_sources().get("sanitizers", {})
        for tool in SANITIZERS:
            for group in groups:
                if not is_clean(earlier.get(tool, {}).get(group)):
                    self.add_sanitized(tool, group, self.tests.sanitize(tool, group))

    def add_sanitized(self, tool: str, group: str, outcomes: Outcomes | None) -> None:
        if outcomes is not None:
            self.record.sanitizers.setdefault(tool, {})[group] = outcomes
            self.record.write()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    if arguments and arguments[0] == "prebuild":
        parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu prebuild")
        parser.add_argument("folder", type=Path)
        parser.add_argument("--capability", default="9.0", help="compute capability of the device; default 9.0")
        chosen = parser.parse_args(arguments[1:])
        prebuild(root, chosen.folder, chosen.capability)
        return 0
    options = arguments_of(arguments)
    groups = ["--groups", *options.groups] if options.groups else []
    command = shlex.join(["python", "-m", "benchmarks.gpu", *options.parts, *groups])  # without paths of this machine
    return 0 if Run(options, root).main(command) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C: end the running command, and write the record
    sys.exit(main(sys.argv[1:]))
