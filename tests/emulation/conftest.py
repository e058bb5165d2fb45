"""The CUDA backend compiled for the host, once for all tests."""

import os

import pytest

from emulation import build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # of all workers
    directory = directory / "emulation"
    directory.mkdir(exist_ok=True)
    return build.load(directory)
