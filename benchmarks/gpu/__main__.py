"""Builds, checks, profiles and times the CUDA kernels on a GPU. Made for fifteen minutes on a rented device, in two calls.

First call, at most 430 s, with a build brought along (without one, 40 s later):

    python3 -m benchmarks.gpu check profile sanitize --limit 415 --prebuilt build/prebuilt --wheels build/wheels \\
        --commit HASH --output FOLDER

      0 s  missing packages, device, builds                          20 s
     20 s  bring-up of each family in the build that traps           2 x 30 s, at most 75 s each
     80 s  first times of the families that passed                   at most 60 s; the first are there by 110 s
    140 s  ncu on the three kernels, and a step kernel by kernel     at most 75 s and 40 s; 160 s are left for what follows
    230 s  all tests: each family, portable kernels, search          4 x 30 s, at most 90 s each
    350 s  memcheck of what failed, then compute-sanitizer on the rest with the time that is left

Second call, at most 270 s: the times with all peers, and what failed and was mended.

    python3 -m benchmarks.gpu time --limit 255 --earlier benchmarks/results/DEVICE.json ...as above
    python3 -m benchmarks.gpu check sanitize time --groups search --limit 255 --earlier ...as above

HASH is the full hash of the commit; without one the result cannot switch anything on. FOLDER is the one that the device's
files come back from: the result, the log, the report of ncu and a picture.

--prebuilt takes what `python3.12 -m benchmarks.gpu prebuild build/prebuilt` has made with a Python of the device's version,
on a system whose glibc is not newer than the device's (needs nvcc, setuptools, pybind11 and ninja; 13 MB for both builds).
--wheels takes a folder of wheels for a machine without a network: `pip download --no-deps` of tyro, docstring_parser and
typeguard, and for `time` of pytorch-metric-learning, cut-cross-entropy and liger-kernel. git ignores build/: a copy of the
tree has to name these folders.

Exit code 0: everything that ran passed, and all tests that were asked for ran. Times, profiles and sanitizers may be cut
short. The result is DEVICE.json in FOLDER, written after every step; commit it in benchmarks/results, switch on what
passed (fused_margin/ops/dispatch.py), and run `python -m benchmarks.publish benchmarks/results/DEVICE.json`.
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

from .builds import PLAIN, TRAP, Builds, prebuild
from .outcomes import FAMILIES, PORTABLE, SEARCH, Outcomes, is_clean
from .record import Record, commit_of, device_slug, failures_of, kernel_sources
from .steps import FAILED, PASSED, Steps
from .testing import Tests

ROOT = Path(__file__).parents[2]
PARTS = ("check", "profile", "sanitize", "time")
NEEDED = ("torch", "numpy", "pytest", "hypothesis", "matplotlib", "rich", "tyro", "docstring_parser", "typeguard")
TO_BUILD = ("setuptools", "pybind11", "ninja")
PEERS = ("pytorch_metric_learning", "cut_cross_entropy", "liger_kernel", "triton")
FIRST_TIMES_SECONDS = 60
TEST_SECONDS = 160  # that profiles leave for the tests
SANITIZERS = ("memcheck", "racecheck", "synccheck")
NCU_SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis",
)  # fmt: skip
FIND = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))"
DESCRIBE = """
import json, platform, torch
import fused_margin as fm
from benchmarks import kernels
if why := kernels.missing("cuda"):
    raise SystemExit(why)
gpu = torch.cuda.get_device_properties()
print(json.dumps({
    "families": kernels.available_families(),
    "hardware": {"gpu": gpu.name, "gpu_capability": f"{gpu.major}.{gpu.minor}"},
    "versions": {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "fused_margin": fm.build_info(),
    },
}))
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
        help="what to check; default: all that the device runs",
    )
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything; default 570")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--prebuilt", type=Path, help="folder made by prebuild; default: build here")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument(
        "--earlier", type=Path, help="result of an earlier call, whose tests count for the same sources"
    )
    parser.add_argument("--commit", help="hash of the commit that is measured; default: from git")
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
            for path in self.record.times:  # the record has their content
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
        """Packages, builds, and what the machine is; False where one is missing."""
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
            self.steps.print(f"=== no commit ({commit}): the result can switch nothing on; see --commit")
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
        """Families that passed in an earlier call with the same sources. The benchmarks check answers all the same."""
        tests = self.record.of_same_sources().get("tests", {})
        return [name for name in self.available if is_clean(tests.get(name)) and tests[name]["passed"]]

    def check(self, families: list[str], others: list[str]) -> None:
        """Bring-up in the build that traps, first times and profiles of what passed, all tests, memcheck of what failed."""
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
        """Times of the families that passed. A contestant of ours whose answer is wrong is a fault."""
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
        """Why a kernel takes as long as it does, and which kernels a step is made of."""
        report = self.options.output / f"{self.gpu}-ncu"
        sections = [argument for name in NCU_SECTIONS for argument in ("--section", name)]
        kernels = [self.python, "-m", "benchmarks.gpu.profile", "kernels", *self.passed]
        options = ["--clock-control", "none", "--kernel-name", "regex:sweep", *sections, "-f", "-o", str(report)]
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
        """What an earlier call found clean with the same sources is not run again."""
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
    command = shlex.join(["python", "-m", "benchmarks.gpu", *options.parts, *groups])  # without this machine's paths
    return 0 if Run(options, root).main(command) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C: the command that runs is ended, and the record written
    sys.exit(main(sys.argv[1:]))
