"""Shared fixtures and the import path of the tests."""

import os
import sys
from pathlib import Path

# Most tests use small tensors, for which several threads mostly wait for each other, above all under pytest-xdist.
# OpenMP reads this variable when torch is imported, and child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # loss_inputs, ranks and others; emulation
sys.path.append(str(Path(__file__).parents[1]))  # benchmarks; last, so that an installed fused_margin comes first


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    from forks import Forks

    started = Forks(tmp_path_factory.mktemp("forks"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def ranks(forks, tmp_path_factory):
    from ranks import Ranks

    started = Ranks(forks, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture
def pictures():
    """Makes `blank_pictures` draw, for tests that check the pictures."""


@pytest.fixture
def blank_pictures(request, monkeypatch):
    """Leaves the pictures of runs and evaluations blank: drawing them takes longer than training a small network."""
    if "pictures" not in request.fixturenames:
        from PIL import Image

        from fused_margin.trainer.evaluate import figures

        monkeypatch.setattr(figures, "_save", lambda figure, path, title: Image.new("L", (1, 1)).save(path, "PNG"))


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
