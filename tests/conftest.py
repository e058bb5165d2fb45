"""Fixtures and the import path the tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # problems, emulation; benchmarks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
