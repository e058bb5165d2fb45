"""The CUDA backend compiled for the host, once for all tests."""

import pytest

from emulation import build


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return build.load(tmp_path_factory.mktemp("emulation"))
