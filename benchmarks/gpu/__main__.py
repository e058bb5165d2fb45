"""Builds, checks, profiles and times the CUDA kernels on a GPU. Made for fifteen minutes on a rented device, in two calls.

First call, at most 430 s, with a build brought along (the second column without one: 40 s later):

    python3 -m benchmarks.gpu check profile sanitize --limit 420 --prebuilt build/prebuilt --wheels build/wheels \\
        --commit $(git rev-parse HEAD) --output results

      0 s  packages that are missing, device, builds               20 s
     20 s  bring-up of each family in the build that traps         2 x 30 s, at most 75 s each
     80 s  first times of the families that are right              at most 60 s; the first are there by 110 s
    140 s  ncu on the three kernels, and a step kernel by kernel   at most 75 s and 40 s
    230 s  all tests: each family, portable kernels, search        4 x 30 s, at most 90 s each
    350 s  compute-sanitizer with the time that is left            at most 75 s each

Second call, at most 270 s: where all of it was right, the times beside all peers; else the family that was mended.

    python3 -m benchmarks.gpu time --limit 260 --earlier results/DEVICE.json ...as above
    python3 -m benchmarks.gpu check profile --families sm90 --limit 260 ...as above

--prebuilt takes what `python3.12 -m benchmarks.gpu prebuild FOLDER` has made with a Python of the device's version, on a
system whose glibc is not newer than the device's (needs nvcc, setuptools, pybind11 and ninja; 13 MB for both builds).
--wheels takes a folder of wheels for a machine without a network: `pip download --no-deps` of tyro, docstring_parser,
typeguard, and for `time` pytorch-metric-learning, cut-cross-entropy and liger-kernel.

Exit code 0: all that was asked for is right. Steps that only use the time that is left are not faults. The result is
DEVICE.json in --output, written after every step; commit it, switch on what passed (fused_margin/ops/dispatch.py), and
run `python -m benchmarks.publish DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .builds import PLAIN, TRAP, Builds, architectures, prebuild
from .outcomes import FAMILIES, PORTABLE, SEARCH, Outcomes
from .record import Record, commit_of, kernel_sources
from .steps import FAILED, PASSED, Steps
from .testing import Tests

ROOT = Path(__file__).parents[2]
PARTS = ("check", "profile", "sanitize", "time")
NEEDED = ("torch", "numpy", "pytest", "hypothesis", "matplotlib", "rich", "tyro", "docstring_parser", "typeguard")
TO_BUILD = ("setuptools", "pybind11", "ninja")
PEERS = ("pytorch_metric_learning", "cut_cross_entropy", "liger_kernel", "triton")
FIRST_TIMES_SECONDS = 60
SANITIZERS = ("memcheck", "racecheck", "synccheck")
NCU_SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis",
)  # fmt: skip
FIND = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))"
DESCRIBE = """
import json, platform, torch
import fused_margin as fm
from benchmarks import kernels
assert not kernels.missing("cuda"), kernels.missing("cuda")
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
    parser.add_argument("parts", nargs="*", choices=PARTS, default=[], metavar="|".join(PARTS), help="default: all")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, help="default: all that the device runs")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for everything; default 570")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of the results")
    parser.add_argument("--prebuilt", type=Path, help="folder made by prebuild; default: build here")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument(
        "--earlier", type=Path, help="result of an earlier call, whose tests count for the same sources"
    )
    parser.add_argument("--commit", help="hash of the commit that is measured; default: from git")
    parser.add_argument("--python", default=sys.executable, help="interpreter with torch; default: this one")
    chosen = parser.parse_args(arguments)
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
            "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(root), "TORCH_CUDA_ARCH_LIST": architectures(capability),
        }  # fmt: skip
        self.steps = Steps(options.limit, log, root, environment)
        self.builds = Builds(self.steps, self.python, options.prebuilt)
        self.tests = Tests(self.steps, self.python)
        self.right: list[str] = []  # families

    def query_device(self) -> tuple[str, str, str]:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
        try:
            first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            sys.exit(f"No GPU: nvidia-smi does not name one ({error})")
        name, driver, capability = (part.strip() for part in first.split(","))
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), driver, capability

    def wanted(self, part: str) -> bool:
        return part in self.options.parts

    def main(self, command: str) -> bool:
        if self.prepare(command):
            groups = self.options.families or [*self.available, PORTABLE, SEARCH]
            families = [name for name in self.available if name in groups]
            if self.wanted("check"):
                self.check(families, [name for name in groups if name not in families])
            else:
                self.take_over(families)
            if self.wanted("sanitize"):
                self.sanitize([*self.right, *(name for name in groups if name not in families)])
            if self.wanted("time"):
                self.time()
            self.record.write()
            self.record.times.unlink(missing_ok=True)  # all of it is in the record
        self.steps.say(f"\n=== summary, {self.steps.elapsed():.0f} s")
        for step in self.steps.done:
            self.steps.say(str(step))
        return not any(step.wrong for step in self.steps.done)

    def prepare(self, command: str) -> bool:
        """Packages, builds, and what the machine is; False where one is missing."""
        if self.options.wheels is not None:
            site = tempfile.mkdtemp(prefix="fused-margin-site-")
            wheels = sorted(map(str, self.options.wheels.glob("*.whl")))
            install = [self.python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", f"--target={site}"]
            if self.steps.run("wheels", 60, [*install, *wheels]).wrong:
                return False
            self.steps.environment["PYTHONPATH"] += f":{site}"
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
        if self.steps.run("machine", 60, [self.python, "-c", code]).wrong:
            return False
        machine = json.loads(described.read_text())
        described.unlink()
        machine["hardware"]["driver"] = self.driver
        self.available: list[str] = machine.pop("families")
        asked = self.options.families or ()
        if absent := [name for name in asked if name not in self.available]:
            self.steps.finish("families", FAILED, 0.0, f"not in this build or not for this device: {' '.join(absent)}")
            return False
        earlier = json.loads(self.options.earlier.read_text()) if self.options.earlier else {}
        self.record = Record(
            self.options.output / f"{self.gpu}.json", self.options.output / f"{self.gpu}-times.json", command,
            self.options.commit or commit_of(self.root), kernel_sources(self.root), machine, self.steps, earlier,
        )  # fmt: skip
        self.record.times.unlink(missing_ok=True)
        self.record.write()
        return True

    def take_over(self, families: list[str]) -> None:
        """Families that an earlier call found right, of the same sources; their answers are still checked before times."""
        tests = self.record.of_same_sources().get("tests", {})
        for family in families:
            found = tests.get(family, {"passed": 0})
            if found["passed"] and not found["failed"] and not found["unfinished"]:
                self.right.append(family)
        if self.right != families:
            missing = [family for family in families if family not in self.right]
            self.steps.finish("earlier tests", FAILED, 0.0, f"not passed with these sources: {' '.join(missing)}")

    def check(self, families: list[str], others: list[str]) -> None:
        """Bring-up in the build that traps, first times and profiles of what is right, then all tests."""
        for family in reversed(families):  # the simplest first
            found = self.record.tests.setdefault(family, Outcomes())
            found.add(self.tests.bring_up(family))
            self.record.write()
            if found.right:
                self.right.insert(0, family)
            elif found.wrong_tests:
                self.note_sanitizer("memcheck", family, self.tests.sanitize("memcheck", family, found.wrong_tests))
        self.builds.use(PLAIN)
        if self.right:
            self.first_times()
            if self.wanted("profile"):
                self.profile()
        for group in [*self.right, *others]:
            found = self.record.tests.setdefault(group, Outcomes())
            outcomes = self.tests.all_of(group)
            found.add(outcomes)
            found.complete = outcomes.complete
            self.record.write()
            if group in self.right and not found.right:
                self.right.remove(group)
            if not found.right or not found.complete:
                detail = f"{len(found.wrong_tests)} tests of {len(found.tests)} are wrong or unfinished"
                self.steps.finish(group, FAILED, 0.0, detail)

    def first_times(self) -> None:
        self.steps.run(
            f"first times: {' '.join(self.right)}", FIRST_TIMES_SECONDS,
            [
                self.python, "-m", "benchmarks", "kernels", "--device", "cuda", "--rounds", "5", "--warmup", "1",
                "--no-compiled", "--families", *self.right, "--output", str(self.record.times),
            ],
            optional=True,
        )  # fmt: skip
        self.record.write()

    def profile(self) -> None:
        """Why a kernel takes as long as it does, and which kernels a step is made of."""
        report = self.options.output / f"{self.gpu}-ncu"
        sections = [argument for name in NCU_SECTIONS for argument in ("--section", name)]
        profiled = self.steps.run(
            "ncu", 75,
            [
                "ncu", "--clock-control", "none", "--kernel-name", "regex:sweep", *sections, "-f", "-o", str(report),
                self.python, "-m", "benchmarks.gpu.profile", "kernels", *self.right,
            ],
            optional=True,
        )  # fmt: skip
        if profiled.state == PASSED:
            self.steps.run(
                "ncu, as text", 20, ["ncu", "--import", f"{report}.ncu-rep", "--page", "details"], optional=True
            )
        self.steps.run(
            "steps by kernel", 40,
            [self.python, "-m", "benchmarks.gpu.profile", "steps", *self.right, PORTABLE], optional=True,
        )  # fmt: skip
        self.record.write()

    def sanitize(self, groups: Sequence[str]) -> None:
        for tool in SANITIZERS:
            for group in groups:
                self.note_sanitizer(tool, group, self.tests.sanitize(tool, group))

    def note_sanitizer(self, tool: str, group: str, outcomes: Outcomes | None) -> None:
        if outcomes is not None:
            self.record.sanitizers.setdefault(tool, {})[group] = outcomes
            self.record.write()

    def time(self) -> None:
        self.builds.use(PLAIN)
        self.steps.run(
            f"times: {' '.join(self.right)}", 300,
            [
                self.python, "-m", "benchmarks", "kernels", "--device", "cuda", "--rounds", "9", "--families", *self.right,
                "--output", str(self.record.times),
            ],
        )  # fmt: skip
        self.record.write()


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    if arguments and arguments[0] == "prebuild":
        parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu prebuild")
        parser.add_argument("folder", type=Path)
        parser.add_argument("--capability", default="9.0", help="compute capability of the device; default 9.0")
        chosen = parser.parse_args(arguments[1:])
        prebuild(root, chosen.folder, chosen.capability)
        return 0
    options = arguments_of(arguments)
    return 0 if Run(options, root).main(shlex.join(["python", "-m", "benchmarks.gpu", *arguments])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
