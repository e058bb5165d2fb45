"""Stand-ins for a GPU, its tools and the CUDA tests, on which `python -m benchmarks.gpu` runs in the tests."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest

from benchmarks.common.files import ROOT
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import builds, steps, testing

COMMIT = "c0ffee" + 34 * "0"

# A torch without a device. An environment variable marks the device as lost, for this process only.
TORCH = """
import os
class cuda:
    @staticmethod
    def is_initialized(): return True
    @staticmethod
    def synchronize():
        if os.environ.get("LOST"): raise RuntimeError("CUDA error: unspecified launch failure")
"""

# Tests with the names of those in tests/cuda. The environment variable FAULT selects a fault of sm90.
CUDA_TESTS = """
import os, time, pytest
if os.environ.get("FAULT") == "import": raise ImportError("a package that is missing")
pytestmark = pytest.mark.cuda
FAULT = os.environ.get("FAULT", "")

def faulty(family):
    if family != "sm90": return
    if FAULT == "trap":
        os.environ["LOST"] = "1"
        raise RuntimeError("CUDA error: unspecified launch failure")
    if FAULT == "hang": time.sleep(600)
    if FAULT == "wrong": assert 1.0 == 2.0
    if FAULT == "late": os.environ["LOST"] = "1"  # shows at the next synchronization

@pytest.mark.sanitizer
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_small_integers_multiply_exactly(family, record_property):
    record_property("arithmetic", family)

@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_exponent_sum(family):
    assert not os.environ.get("LOST"), "the context of this process is gone"
    faulty(family)

@pytest.mark.sanitizer
@pytest.mark.parametrize("family", ["portable", "sm80", "sm90"])
def test_losses_and_gradients(family):
    assert not os.environ.get("LOST"), "the context of this process is gone"

@pytest.mark.sanitizer
@pytest.mark.half_products
@pytest.mark.parametrize("family", ["sm80", "sm90"])
def test_options(family):
    if FAULT == "wrong in all": assert family != "sm90"
    if FAULT == "slow test" and family == "sm90": time.sleep(600)

@pytest.mark.sanitizer
def test_exact_search(): pass

def test_second_device(): pytest.skip("needs two devices")
"""

PYTHON = """#!/usr/bin/env bash
# An interpreter whose torch and benchmarks are stand-ins.
case "$*" in
*"-m pip install"*) exit 0 ;;
*find_spec*) echo "$MISSING"; exit 0 ;;
*"machine.json"*) exec {python} -c "
import json, re, sys
json.dump({{'families': ['sm90', 'sm80'], 'hardware': {{'gpu': 'Stand-in 1'}}, 'versions': {{'torch': '0'}}}},
          open(re.search(r\\"open\\('(.*?)'\\", sys.argv[1])[1], 'w'))" "$2" ;;
*"-m benchmarks kernels"*)
    echo "benchmarks: $*" >>{calls}
    for last; do :; done
    suites=${{SUITES:-}}
    [[ -n $suites ]] || suites='{{}}'
    printf '{{"command": "python -m benchmarks kernels --output /some/place --rounds 5", "suites": %s, "hardware": {{"cpu": "any"}}}}' "$suites" >"$last"
    [[ "$FAULT" != "slow times" ]] || sleep 600
    ;;
*"-m benchmarks.gpu prebuild"*)
    echo "prebuild: $*" >>{calls}
    [[ "$FAULT" != "build" ]] || exit 1
    mkdir -p "$4" && cp -r prebuilt/. "$4"
    ;;
*"-m benchmarks.gpu.profile"*) echo "profile: $*" >>{calls} ;;
*"-m pytest"*)
    echo "pytest: $(cat fused_margin/_C.stand-in.so) $*" >>{calls}
    exec {python} "$@"
    ;;
*) echo "unexpected: $*" >&2; exit 3 ;;
esac
"""


class StandIn:
    """A source tree, a device and its tools; `run` returns the exit code and the result."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.calls, self.output = path / "tree", path / "calls", path / "out"
        monkeypatch.setattr(testing, "HANG_SECONDS", 3)
        monkeypatch.setattr(testing, "SANITIZER_HANG_SECONDS", 3)
        monkeypatch.setattr(steps, "LEAST_SECONDS", 0.5)
        monkeypatch.setattr(testing, "LEAST_SECONDS", 0.5)
        self.write("torch.py", TORCH)
        self.write("pytest.ini", "[pytest]\nmarkers =\n    cuda\n    sanitizer\n    half_products\n")
        self.write("tests/cuda/test_accuracy.py", CUDA_TESTS)
        self.write("csrc/kernel.cu", "")
        self.write("fused_margin/__init__.py", "")
        for variant in (builds.PLAIN, builds.TRAP):
            self.write(f"prebuilt/{variant}/fused_margin/_C.stand-in.so", variant)
        self.write("prebuilt/fused_margin.egg-info/PKG-INFO", "")
        (self.root / "benchmarks").symlink_to(ROOT / "benchmarks")
        tools = {
            "nvidia-smi": 'echo "Stand-in 1, 580.1, 9.0"',
            "ncu": f'echo "ncu: $*" >>{self.calls}',
            "compute-sanitizer": f'echo "sanitizer: $*" >>{self.calls}; while [[ $1 == -* ]]; do shift; done; exec "$@"',
        }
        for name, body in tools.items():
            self.write(f"bin/{name}", f"#!/usr/bin/env bash\n{body}\n").chmod(0o755)
        self.python = self.write("bin/stand-in", PYTHON.format(python=sys.executable, calls=self.calls))
        self.python.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.root / 'bin'}:{os.environ['PATH']}")
        # Many processes start, and their tests need no plugins.
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        self.monkeypatch = monkeypatch

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    def run(self, *arguments: str, fault: str = "", prebuilt: bool = True) -> tuple[int, dict]:
        self.monkeypatch.setenv("FAULT", fault)
        brought = ["--prebuilt", str(self.root / "prebuilt")] if prebuilt else []
        options = ["--limit", "300", "--output", str(self.output), "--python", str(self.python), "--commit", COMMIT]
        code = command.main([*arguments, *options, *brought], self.root)
        result = self.output / "stand-in-1.json"
        return code, json.loads(result.read_text()) if result.exists() else {}

    def called(self, kind: str) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.startswith(kind)]
