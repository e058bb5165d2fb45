"""Fixtures of the tests on a device."""

import os

import pytest
import torch
from on_device import FAMILIES

from fused_margin._ops.backends import select


@pytest.fixture(autouse=True)
def all_threads():
    """Use all threads: the CPU computes expected results for larger shapes than in other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(threads)


def serve(name):
    if name in FAMILIES:
        if not FAMILIES[name].compiled:
            pytest.skip(f"{name} is not compiled")
        if not FAMILIES[name].runs_on(torch.cuda.get_device_capability()):
            pytest.skip(f"{name} does not run on this device")
    with select.force_backend(name):
        yield name


@pytest.fixture(params=[select.PORTABLE, *FAMILIES])
def backend(request):
    yield from serve(request.param)


@pytest.fixture(params=FAMILIES)
def family(request):
    yield from serve(request.param)


@pytest.fixture(params=["highest", "high"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)
