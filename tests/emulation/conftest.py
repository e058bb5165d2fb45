"""The CUDA backend compiled for the host, once for all tests."""

import os

import pytest

from emulation import build
from fused_margin import _C
from fused_margin._ops.backends.select import Kernels


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # shared by all workers
    directory = directory / "emulation"
    directory.mkdir(exist_ok=True)
    return build.load(directory)


@pytest.fixture
def backends(emulated):
    """The kernels of the CPU, which give the expected results, and those of CUDA on the host."""
    return Kernels(_C.cpu, 0), Kernels(emulated.cuda, 0)
