"""Fixtures of the tests of studies."""

import resource
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def keep_process_settings() -> Iterator[None]:
    """The command limits the memory and sets the threads of its process, which other tests share."""
    limit, threads = resource.getrlimit(resource.RLIMIT_DATA), torch.get_num_threads()
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limit)
    torch.set_num_threads(threads)
