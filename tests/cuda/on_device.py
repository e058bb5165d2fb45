"""Inputs, tolerances and marks that the tests on a device share."""

import math

import pytest
import torch
from loss_inputs import ours, problem, relative_error, truth

import fused_margin as fm
from fused_margin._ops.backends import select

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not fm.build_info()["cuda"]["available"], reason="needs a CUDA device and a CUDA build"),
]
sanitizer = pytest.mark.sanitizer
# racecheck fails in torch's own half-precision products, at least on Hopper (benchmarks/gpu/testing.py).
half_products = pytest.mark.half_products

DEVICE = "cuda"
FAMILIES = {family.name: family for family in reversed(select.FAMILIES)}
HALVES = [torch.float16, torch.bfloat16]
ARCFACE = {"m2": 0.5}


def tolerance(precision, size, scale=64.0):
    """Rounding operands to fp16 changes a logit in proportion to its scale over the square root of the size."""
    if precision == "highest":
        return 1e-5
    return 5e-4 * max(1.0, math.sqrt(512 / size)) * max(1.0, scale / 64)


def on_device(*tensors):
    return [t.to(DEVICE) for t in tensors]


def single(*shape):
    return on_device(*(t.float() if t.is_floating_point() else t for t in problem(*shape)))


def needs_gibibytes(count):
    if torch.cuda.mem_get_info()[0] < count * 2**30:
        pytest.skip(f"needs {count} GiB of device memory")


def check(x, w, y, limit, **options):
    expected = truth(x, w, y, ARCFACE, **{k: v for k, v in options.items() if k != "workspace_mb"})
    for m, e in zip(ours(x, w, y, ARCFACE, **options), expected, strict=True):
        assert m.device == e.device and relative_error(m, e) < limit
