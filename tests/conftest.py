"""Fixtures and the import path the tests share."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # problems, emulation
sys.path.append(str(Path(__file__).parents[1]))  # benchmarks; last, so that an installed fused_margin comes first


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
