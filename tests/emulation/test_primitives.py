"""The emulator itself: correct kernels give the right result, and kernels with an injected mistake are detected."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host

SOURCE = Path(__file__).with_name("primitives.cpp")
FOREVER = "wait for each other forever"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("primitives") / "primitives"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-Wall", "-U_FORTIFY_SOURCE"]
    subprocess.run([*compiler, str(SOURCE), "-o", str(target)], check=True)
    return target


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("family", ["common", "halves", "sums", "sm80", "sm90"])
def test_correct_kernels(program, family):
    result = run(program, family)
    assert result.returncode == 0, result.stderr


MISTAKES = [
    ("common", "a lane leaves", FOREVER),
    ("common", "another branch", "another collective"),
    ("sm80", "short wait", "wrong result"),
    ("sm80", "no barrier", "wrong result"),
    ("sm80", "early load", "wrong result"),
    ("sm80", "load beyond the end", "without waiting for its asynchronous operations"),
    ("sm80", "too little shared memory", "outside of dynamic shared memory"),
    ("sm90", "early release", "wrong result"),
    ("sm90", "one warp releases", "wrong result"),
    ("sm90", "no wait for a stage", "more arrivals than the phase expects"),
    ("sm90", "a warp does not release", FOREVER),
    ("sm90", "two releases", FOREVER),
    ("sm90", "producer's parity", FOREVER),
    ("sm90", "bytes", FOREVER),
    ("sm90", "no first cluster_sync", "no mbarrier here"),
    ("sm90", "no last cluster_sync", "a block that has left"),
    ("sm90", "no first turn", FOREVER),
    ("sm90", "out of turn", "more arrivals than the phase expects"),
    ("sm90", "turn after the last", "half full"),
    ("sm90", "no cluster", "a multicast load in a launch without clusters"),
    ("sm90", "misplaced tile", "neither at a tile's base"),
    ("sm90", "descriptor", "not a descriptor"),
    ("sm90", "no fence", "wgmma_fence"),
    ("sm90", "no last wait", "without waiting for its asynchronous operations"),
]


@pytest.mark.parametrize(("family", "mistake", "expected"), MISTAKES, ids=str)
def test_mistakes_are_detected(program, family, mistake, expected):
    result = run(program, family, mistake)
    assert result.returncode != 0 and expected in result.stderr, result.stderr
