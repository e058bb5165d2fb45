"""Fixtures and the import path the tests share."""

import os
import sys
from pathlib import Path

# Most tests' tensors are small: several threads would mostly wait for each other, in workers of pytest-xdist most of
# all. OpenMP reads this when torch is imported, and processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # problems, emulation
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
    """For tests that look at the pictures: `blank_pictures` has them drawn."""


@pytest.fixture
def blank_pictures(request, monkeypatch):
    """The pictures of runs and evaluations, which take longer to draw than a small network to train, are blank."""
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
