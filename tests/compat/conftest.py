"""Fixtures the tests of the drop-ins share."""

import pytest
from ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()
