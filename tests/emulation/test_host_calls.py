"""The host code around a launch, with a CUDA runtime that records its calls."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host

HERE = Path(__file__).parent


def test_host_calls(tmp_path):
    """Shared memory is permitted once per kernel and device, with any number of threads; later calls only launch."""
    program = tmp_path / "host_calls"
    compiler = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-Wall", "-pthread", f"-I{HERE / 'runtime'}"]
    subprocess.run([*compiler, str(HERE / "host_calls.cpp"), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
