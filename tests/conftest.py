"""Fixtures and the import path the tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # problems, emulation
sys.path.append(str(Path(__file__).parents[1]))  # benchmarks; last, so that an installed fused_margin comes first


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    from ranks import Ranks

    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


def pytest_addoption(parser):
    parser.addoption(
        "--deterministic", action="store_true", help="deterministic algorithms: torch fills new memory with NaN"
    )


@pytest.fixture(autouse=True)
def deterministic_algorithms(request):
    if not request.config.getoption("--deterministic"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
