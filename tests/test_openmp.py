"""One OpenMP runtime in a process: the extension uses the one that torch has loaded, whatever its file is called."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_margin as fm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only the Linux build uses OpenMP")
RUNTIME = re.compile(r"/lib(gomp|iomp5|omp)[-.][^/]*$")


def mapped_runtimes() -> set[str]:
    """The OpenMP libraries that this process has loaded."""
    files = (line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines())
    return {file for file in files if RUNTIME.search(file)}


def runtimes_after_a_step() -> set[str]:
    loss_fn = fm.ArcFaceLoss(50, 8)
    loss_fn(torch.randn(6, 8), torch.arange(6)).backward()
    return mapped_runtimes()


def test_one_runtime_after_a_step(forks):
    (runtimes,) = forks.run(runtimes_after_a_step, [()])
    # scikit-learn, which other tests import, bundles a runtime for its own code.
    assert len({file for file in runtimes if "scikit_learn" not in file}) == 1, runtimes


PROGRAM = """
import ctypes, runpy, sys
(runtime,) = sys.argv[1:]
ctypes.CDLL(runtime, mode=ctypes.RTLD_LOCAL)  # as torch loads it for itself
before = hasattr(ctypes.CDLL(None), "GOMP_parallel")
runpy.run_path(sys.path[0] + "/_openmp.py")["share_runtime"]()
print(before, hasattr(ctypes.CDLL(None), "GOMP_parallel"))
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}))
"""


@pytest.mark.parametrize("name", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-0123abcd.so.1.0.0"])
def test_runtime_that_torch_keeps_to_itself(tmp_path, name):
    """A stand-in for a wheel of torch whose libtorch_global_deps does not name the runtime: 2.7's for aarch64."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    if not bundled:
        pytest.skip("this torch bundles no libgomp")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/__init__.py").touch()
    runtime = tmp_path / name
    runtime.parent.mkdir(exist_ok=True)
    shutil.copy(bundled[0], runtime)
    (tmp_path / "program.py").write_text(PROGRAM)
    shutil.copy(Path(fm.__file__).parent / "_openmp.py", tmp_path)
    command = [sys.executable, "program.py", str(runtime)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == ["False True", str(runtime)], result.stdout + result.stderr
